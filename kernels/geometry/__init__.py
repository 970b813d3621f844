"""Lengths and angles of the edges, one kernel a view. The geometry keeps its precision under autocast."""

from __future__ import annotations

import torch

from ..segments import Segments
from .reference import invariant_geometry as invariant_geometry_reference
from .reference import inverse_length as inverse_length_reference

__all__ = ["invariant_geometry", "inverse_length"]


def inverse_length(vec: torch.Tensor, *, backend: str = "torch") -> torch.Tensor:
    """−0.75 / |v|, (..., 3) → (...); see `reference.inverse_length`."""
    if backend == "torch":
        return inverse_length_reference(vec)
    return _inverse_length(vec)


def invariant_geometry(
    edge_vec: torch.Tensor,
    frame: torch.Tensor,
    crystal: Segments,
    cosine_noise: torch.Tensor | None = None,
    *,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """−0.75 / |r_e| (E,), and the cosines to the frame (E, 3); see `reference.invariant_geometry`."""
    if backend == "torch":
        return invariant_geometry_reference(edge_vec, frame, crystal, cosine_noise)
    return _invariant_geometry(edge_vec, frame, crystal.index, crystal.ptr, cosine_noise)


@torch.library.custom_op("mgt_fast::inverse_length", mutates_args=())
def _inverse_length(vec: torch.Tensor) -> torch.Tensor:
    from .triton import inverse_length

    return inverse_length(vec)


@_inverse_length.register_fake
def _(vec):
    return vec.new_empty(vec.shape[:-1])


@torch.library.custom_op("mgt_fast::invariant_geometry", mutates_args=())
def _invariant_geometry(
    edge_vec: torch.Tensor,
    frame: torch.Tensor,
    crystal_index: torch.Tensor,
    crystal_ptr: torch.Tensor,
    cosine_noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton import invariant_geometry

    return invariant_geometry(edge_vec, frame, crystal_index, cosine_noise)


@_invariant_geometry.register_fake
def _(edge_vec, frame, crystal_index, crystal_ptr, cosine_noise):
    return edge_vec.new_empty(edge_vec.shape[0]), torch.empty_like(edge_vec)


# Training asks for no gradient of the geometry, forces would: it comes from the plain PyTorch formulas.


def _gradient(function, inputs, wanted, grad_outputs):
    """Gradient of the wanted inputs, None for the others."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        outputs = function(*inputs)
    # An output may depend on none of them.
    pairs = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]
    outputs, grad_outputs = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, [x for x in inputs if x.requires_grad], grad_outputs))
    return [next(found) if want else None for want in wanted]


def _inverse_length_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _inverse_length_backward(ctx, grad):
    (grad,) = _gradient(lambda vec: [inverse_length_reference(vec)], ctx.saved_tensors, [True], [grad])
    return grad


def _invariant_geometry_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])


def _invariant_geometry_backward(ctx, grad_length, grad_cosines):
    edge_vec, frame, index, ptr = ctx.saved_tensors
    grads = [None, None]
    if any(ctx.needs_input_grad[:2]):
        crystal = Segments(index, frame.shape[0], ptr)
        grads = _gradient(
            lambda *vectors: invariant_geometry_reference(*vectors, crystal),
            (edge_vec, frame),
            ctx.needs_input_grad[:2],
            (grad_length, grad_cosines),
        )
    return *grads, None, None, grad_cosines if ctx.needs_input_grad[4] else None


_inverse_length.register_autograd(_inverse_length_backward, setup_context=_inverse_length_setup)
_invariant_geometry.register_autograd(_invariant_geometry_backward, setup_context=_invariant_geometry_setup)
