import numpy as np
import pytest
import torch

from mgt_fast.kernels.random import fork_keys, normal, random_words, stream_key, uniform

KEYS = fork_keys(torch.arange(4000), stream_key(7, 1))


def splitmix64(seed, n):
    """The published generator, in Python's whole numbers."""
    state, out = seed % 2**64, []
    for _ in range(n):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        out.append(z ^ (z >> 31))
    return out


def test_words_are_those_of_splitmix64():
    seeds = [0, 1, -1, 1234567, 2**63 - 1, -(2**63)]
    words = random_words(torch.tensor(seeds), 5).numpy().view(np.uint64)
    assert words.tolist() == [splitmix64(seed, 5) for seed in seeds]
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # published test vector


def test_stream_keys_depend_on_every_part_and_their_order():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (2**64 - 1,), (5, 3, 2), (5, 2, 3)]
    keys = {stream_key(*some) for some in parts}
    assert len(keys) == len(parts)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert stream_key(-1) == stream_key(2**64 - 1)


def test_rows_depend_on_their_key_alone():
    some = torch.tensor([17, 3, 3999, 3])
    for draw in (uniform, normal):
        assert torch.equal(draw(KEYS, 6)[some], draw(KEYS[some], 6))
        assert torch.equal(draw(KEYS, 6)[:, :5], draw(KEYS, 5))
    assert torch.equal(KEYS, fork_keys(torch.arange(4000), stream_key(7, 1)))  # nothing was changed in place


def test_keys_are_distinct():
    purposes = torch.cat([fork_keys(KEYS, purpose) for purpose in range(50)])
    assert len(purposes.unique()) == 50 * len(KEYS)
    keys, numbers = torch.arange(300)[:, None], torch.arange(300)  # small ones must not meet halfway
    assert len(fork_keys(keys, numbers).unique()) == 300**2


@pytest.mark.parametrize(("draw", "cdf"), [(uniform, lambda x: x), (normal, torch.special.ndtr)])
@pytest.mark.parametrize("axis", [0, 1])
def test_distribution_and_independence(draw, cdf, axis):
    """Uniform distribution (chi-square) of the numbers, and of pairs of neighbours along keys and places."""
    values = cdf(draw(KEYS, 50)).double()
    assert 0 <= values.min() < values.max() <= 1
    first, second = (
        values.narrow(axis, 0, values.shape[axis] - 1),
        values.narrow(axis, 1, values.shape[axis] - 1),
    )
    cells = (first * 20).long().clamp(max=19) * 20 + (second * 20).long().clamp(max=19)
    counts = torch.bincount(cells.flatten(), minlength=400).double()
    chi_square = ((counts - counts.mean()).square() / counts.mean()).sum()
    assert abs(chi_square - 399) < 5 * (2 * 399) ** 0.5


def test_normal_moments_in_both_widths():
    for dtype in (torch.float32, torch.float64):
        values = normal(KEYS, 50, dtype)
        assert values.dtype == dtype
        moments = [values.double().pow(power).mean().item() for power in (1, 2, 3, 4)]
        np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)
        assert values.isfinite().all()
    torch.testing.assert_close(normal(KEYS, 6), normal(KEYS, 6, torch.float64).float(), atol=1e-4, rtol=1e-4)
