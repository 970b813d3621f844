"""Activations that keep less for the backward pass than torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = F.softplus(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return y.neg().expm1_().mul_(grad).neg_()


def softplus(x: torch.Tensor, *, backend: str = "torch") -> torch.Tensor:
    """log(1 + exp x), elementwise.

    The slope is 1 − exp(−y), so the output alone is kept for the backward pass, and the next layer keeps
    that anyway; `F.softplus` keeps its input. Triton computes in float32 or better and returns the type of x,
    under autocast too.
    """
    return _Softplus.apply(x) if backend == "torch" else _softplus(x)


@torch.library.custom_op("mgt_fast::softplus", mutates_args=())
def _softplus(x: torch.Tensor) -> torch.Tensor:
    from .activations_triton import launch_softplus

    return launch_softplus(x.contiguous())


@torch.library.custom_op("mgt_fast::softplus_backward", mutates_args=())
def _softplus_backward(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    from .activations_triton import launch_softplus_backward

    return launch_softplus_backward(grad.contiguous(), y)


@_softplus.register_fake
def _(x):
    return x.new_empty(x.shape)


@_softplus_backward.register_fake
def _(grad, y):
    return y.new_empty(y.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    return _softplus_backward(grad, *ctx.saved_tensors)


_softplus.register_autograd(_backward, setup_context=_setup_context)
