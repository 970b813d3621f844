import math

import pytest
import torch

from mgt_fast.kernels import geometry as op
from mgt_fast.kernels.geometry import invariant_geometry, inverse_length
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.segments import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(num_edges, dtype=torch.float64, num_crystals=3):
    generator = torch.Generator().manual_seed(num_edges)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    index = torch.randint(num_crystals, (num_edges,), generator=generator).sort().values
    ptr = torch.searchsorted(index, torch.arange(num_crystals + 1))
    crystal = Segments(index.to(DEVICE), num_crystals, ptr.to(DEVICE))
    edge_vec, frame, noise = draw(num_edges, 3), draw(num_crystals, 3, 3), 0.05 * draw(num_edges, 3)
    if num_edges:
        edge_vec[0] = -2 * frame[crystal.index[0], 1]  # antiparallel: rounding must not leave [-1, 1]
    return edge_vec.requires_grad_(), frame.requires_grad_(), crystal, noise.requires_grad_()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_against_trigonometry(backend):
    pytest.importorskip("triton")
    angle = torch.tensor([0.0, 0.4, math.pi / 2, 3.0, math.pi], dtype=torch.float64, device=DEVICE)
    edge_vec = 2 * torch.stack((angle.cos(), angle.sin(), torch.zeros_like(angle)), dim=1)
    frame = 3 * torch.eye(3, dtype=torch.float64, device=DEVICE)[None]
    crystal = Segments(torch.zeros(5, dtype=torch.int64, device=DEVICE), 1)
    noise = torch.full_like(edge_vec, 0.25)
    inverse, cosines = invariant_geometry(edge_vec, frame, crystal, noise, backend=backend)
    torch.testing.assert_close(inverse, torch.full_like(angle, -0.375))
    expected = torch.stack((angle.cos(), angle.sin(), torch.zeros_like(angle)), dim=1)
    torch.testing.assert_close(cosines, expected + 0.25)
    torch.testing.assert_close(inverse_length(frame, backend=backend), torch.full_like(frame[0, :1], -0.25))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("num_edges", [0, 1, 15, 63, 300])
def test_equals_reference(num_edges, noisy):
    pytest.importorskip("triton")
    edge_vec, frame, crystal, noise = problem(num_edges)
    inputs = [edge_vec, frame, noise] if noisy else [edge_vec, frame]

    def run(backend):
        arguments = (edge_vec, frame, crystal, noise if noisy else None)
        inverse, cosines = invariant_geometry(*arguments, backend=backend)
        weight = torch.linspace(-1, 2, 3 * num_edges, dtype=torch.float64, device=DEVICE).view(-1, 3)
        loss = (cosines * weight).sum() + (inverse * weight[:, 0]).sum()
        lengths = inverse_length(edge_vec, backend=backend)
        frame_lengths = inverse_length(frame, backend=backend)
        return [
            inverse,
            cosines,
            lengths,
            frame_lengths,
            *torch.autograd.grad(loss, inputs),
            *torch.autograd.grad((lengths * weight[:, 1]).sum() + frame_lengths.sum(), [edge_vec, frame]),
        ]

    with watch_launches() as launches:
        got = run("triton")
    names = ["_invariant_geometry_kernel", "_inverse_length_kernel", "_inverse_length_kernel"]
    assert [launch.name for launch in launches] == names
    for a, b in zip(got, run("torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_only_wanted_gradients():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, _ = problem(15)
    _, cosines = invariant_geometry(edge_vec.detach(), frame, crystal, backend="triton")
    assert not inverse_length(edge_vec.detach(), backend="triton").requires_grad
    (grad,) = torch.autograd.grad(cosines.sum(), frame)
    expected = torch.autograd.grad(invariant_geometry(edge_vec, frame, crystal)[1].sum(), frame)[0]
    torch.testing.assert_close(grad, expected)


def test_gradcheck():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, noise = problem(6)
    with torch.no_grad():
        edge_vec[0] += 0.3  # at the end of the cosine's range there is no gradient
    assert torch.autograd.gradcheck(
        lambda v, f, n: invariant_geometry(v, f, crystal, n, backend="triton"), (edge_vec, frame, noise)
    )
    assert torch.autograd.gradcheck(lambda v: inverse_length(v, backend="triton"), edge_vec)


def test_not_a_number_stays_one():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, _ = problem(3)
    with torch.no_grad():
        edge_vec[1] = float("nan")
    for values in invariant_geometry(edge_vec, frame, crystal, backend="triton"):
        assert values[1].isnan().all()
        assert values[[0, 2]].isfinite().all()


def test_no_less_accurate_than_torch():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, noise = problem(300, torch.float32)
    exact = invariant_geometry(edge_vec.double(), frame.double(), crystal, noise.double())
    got, torch_got = (
        invariant_geometry(edge_vec, frame, crystal, noise, backend=backend)
        for backend in ("triton", "torch")
    )
    for a, b, truth in zip(got, torch_got, exact, strict=True):
        assert (a - truth).norm() <= 2 * (b - truth).norm()


def test_autocast_leaves_the_geometry_alone():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, noise = problem(15, torch.float32)
    plain = invariant_geometry(edge_vec, frame, crystal, noise, backend="triton")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = invariant_geometry(edge_vec, frame, crystal, noise, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_opcheck():
    pytest.importorskip("triton")
    edge_vec, frame, crystal, noise = problem(15)
    torch.library.opcheck(op._inverse_length, (frame,))
    for added in (noise, None):
        torch.library.opcheck(op._invariant_geometry, (edge_vec, frame, crystal.index, crystal.ptr, added))
