import itertools
import math

import numpy as np
import pytest
import torch

from mgt_fast.data.sampling import permuted

KEYS = (0, 1, -1, 2**63, 0x9E3779B97F4A7C15)
SIZES = (*range(1, 130), 255, 256, 257, 1000, 1023, 1024, 1025, 4099, 2**16, 2**16 + 1, 99991)


def chi_square(counts):
    """Standard scores of the chi-square of counts that should be equal (Wilson-Hilferty)."""
    counts = np.asarray(counts, float).ravel()
    freedom = counts.size - 1
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("n", SIZES)
def test_every_item_stands_somewhere(n):
    for key in KEYS:
        assert np.array_equal(np.sort(permuted(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 1024, 12345, 10**8, 2**31 + 11, 2**48])
def test_arrays_and_tensors_agree(n):
    positions = np.random.default_rng(n).integers(0, n, (7, 30))
    for key in KEYS:
        items = permuted(positions, n, key)
        assert items.dtype == np.int64
        assert items.shape == positions.shape
        assert items.min() >= 0
        assert items.max() < n
        np.testing.assert_array_equal(permuted(torch.from_numpy(positions), n, key).numpy(), items)
        np.testing.assert_array_equal(permuted(positions, n, key + 2**64), items)
        assert [int(permuted(p, n, key)) for p in positions[0]] == items[0].tolist()


def test_an_order_stays_what_it_is():
    """Stored runs are resumed with it, by later versions too."""
    assert permuted(np.arange(8), 8, 0).tolist() == [1, 7, 0, 6, 5, 4, 3, 2]
    assert permuted(np.arange(5), 10**8, 2026).tolist() == [51252516, 28004028, 54644983, 66601247, 6260524]


def test_a_hundred_million_items():
    n = 10**8
    million = np.arange(10**6)
    for positions in (million, n - 1 - million, 100 * million):
        items = permuted(positions, n, 5)
        assert len(np.unique(items)) == 10**6
        assert items.min() >= 0
        assert items.max() < n
        assert abs(chi_square(np.bincount(items * 1000 // n, minlength=1000))) < 4.5


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_orders_are_equally_likely(n):
    names = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    orders = [names[tuple(permuted(np.arange(n), n, key).tolist())] for key in range(40 * len(names))]
    assert chi_square(np.bincount(orders, minlength=len(names))) < 4.5


@pytest.mark.parametrize(("n", "bins"), [(7, 7), (33, 33), (1020, 30), (1024, 32)])
def test_every_item_is_equally_likely_at_every_position(n, bins):
    orders = np.stack([permuted(np.arange(n), n, key) for key in range(1500)])
    scores = [chi_square(np.bincount(column * bins // n, minlength=bins)) for column in orders.T]
    assert max(scores) < 5
    assert abs(np.mean(scores)) < 4 / math.sqrt(n)  # they are standard normal


@pytest.mark.parametrize("n", [7, 10, 17])
def test_pairs_of_items_are_equally_likely_at_pairs_of_positions(n):
    orders = np.stack([permuted(np.arange(n), n, key) for key in range(20 * n * n)])
    different = ~np.eye(n, dtype=bool)
    for i, j in itertools.permutations(range(n), 2):
        counts = np.bincount(orders[:, i] * n + orders[:, j], minlength=n * n).reshape(n, n)
        assert chi_square(counts[different]) < 5


@pytest.mark.parametrize("n", [1024, 10**4, 10**6, 10**8])
def test_no_trace_of_the_position_is_left(n):
    """Neighbours, and positions a multiple of √n apart, whose pairs share a half, are as far apart as any."""
    sample = min(n, 200_000)
    root = math.isqrt(n - 1) + 1
    scores, correlations = [], []
    for key in range(8):
        positions = (np.arange(sample) + key * n // 8) % n
        items = permuted(positions, n, key)
        for step in (1, 2, root - 1, root, root + 1, 2 * root, n // 2):
            others = permuted((positions + step) % n, n, key)
            scores.append(chi_square(np.bincount((others - items) % n * 64 // n, minlength=64)))
            correlations.append(np.corrcoef(items, others)[0, 1] * math.sqrt(sample))
        others = permuted(positions, n, key + 1)
        scores.append(chi_square(np.bincount((others - items) % n * 64 // n, minlength=64)))
        cells = np.arange(sample) * 16 // sample * 16 + items * 16 // n
        scores.append(chi_square(np.bincount(cells, minlength=256)))
    assert max(scores) < 5
    assert max(np.abs(correlations)) < 5


def test_what_is_no_position_is_refused():
    with pytest.raises(IndexError, match="position 10 of a permutation of 10"):
        permuted(np.array([3, 10]), 10, 0)
    with pytest.raises(IndexError, match="position -1"):
        permuted(torch.tensor([-1]), 10, 0)
    with pytest.raises(TypeError, match="float64"):
        permuted(np.array([1.0]), 10, 0)
    with pytest.raises(TypeError, match="bool"):
        permuted(torch.tensor([True]), 10, 0)
    with pytest.raises(ValueError, match="n = 0"):
        permuted(np.array([0]), 0, 0)
    assert permuted([], 3, 0).shape == (0,)
