"""Linear layer of a radial-basis expansion and its activation, through the basis' local support."""

from __future__ import annotations

import torch

from ..launch import check_channels
from ..precision import compute_dtype
from .reference import ACTIVATIONS
from .reference import rbf_embedding as rbf_embedding_reference

__all__ = ["rbf_embedding"]


def rbf_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centers: torch.Tensor,
    spacing: float,
    activation: str | None = None,
    *,
    backend: str = "torch",
) -> torch.Tensor:
    """Activation(Linear(RBF(x))), (R,) → (R, C); see `reference.rbf_embedding` for the arguments.

    With Triton the result is bfloat16 under autocast, the geometry x is not.

    Raises:
        ValueError: for an unknown activation; with Triton for a number of channels that is no power of two
            from 16 to 512.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r}; choose one of softplus, silu, None")
    if backend == "torch":
        return rbf_embedding_reference(x, weight, bias, centers, spacing, activation)
    check_channels(weight.shape[0])
    return _rbf_embedding(x, weight, bias, centers, spacing, activation, compute_dtype(x))


@torch.library.custom_op("mgt_fast::rbf_embedding", mutates_args=())
def _rbf_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centers: torch.Tensor,
    spacing: float,
    activation: str | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    from .triton import forward

    return forward(x, weight, bias, centers, spacing, activation, dtype)


@_rbf_embedding.register_fake
def _(x, weight, bias, centers, spacing, activation, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("mgt_fast::rbf_embedding_backward", mutates_args=())
def _rbf_embedding_backward(
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centers: torch.Tensor,
    spacing: float,
    activation: str | None,
    wants_x: bool,
    wants_parameters: bool,
) -> list[torch.Tensor]:
    """Return the gradients that are wanted, of x, or of weight and bias, or of all three."""
    from .triton import backward

    arguments = (grad.contiguous(), out, x, weight, bias, centers, spacing, activation)
    return backward(*arguments, wants_x, wants_parameters)


@_rbf_embedding_backward.register_fake
def _(grad, out, x, weight, bias, centers, spacing, activation, wants_x, wants_parameters):
    like = [x] * wants_x + [weight, bias] * wants_parameters
    return [torch.empty_like(tensor) for tensor in like]


def _setup_context(ctx, inputs, output):
    *tensors, ctx.spacing, ctx.activation, _ = inputs
    # The slope of softplus follows from its value; that of SiLU needs what went in, which is made again.
    ctx.save_for_backward(output if ctx.activation == "softplus" else None, *tensors)


def _backward(ctx, grad):
    wants_x, *wants = ctx.needs_input_grad[:3]
    grads = _rbf_embedding_backward(
        grad, *ctx.saved_tensors, ctx.spacing, ctx.activation, wants_x, wants_parameters := any(wants)
    )
    grad_x = grads.pop(0) if wants_x else None
    grad_weight, grad_bias = grads if wants_parameters else (None, None)
    return grad_x, grad_weight, grad_bias, None, None, None, None


_rbf_embedding.register_autograd(_backward, setup_context=_setup_context)
