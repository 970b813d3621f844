"""Activations and their slopes as Triton functions, for kernels that end or begin with one, and alone.

Alone they are bound by memory: 2 numbers an element forward, 3 backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import launch

BLOCK = 2048


@triton.jit
def softplus(x):
    """Elementwise log(1 + exp x)."""
    return tl.maximum(x, 0) + tl.log(1 + tl.exp(-tl.abs(x)))


@triton.jit
def softplus_slope(y):
    """Slope of softplus where its value is y."""
    return 1 - tl.exp(-y)


@triton.jit
def silu(x):
    """Elementwise x · sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def silu_slope(x):
    """Slope of SiLU at x."""
    gate = tl.sigmoid(x)
    return gate * (1 + x * (1 - gate))


@triton.jit(do_not_specialize=["size"])
def _softplus_kernel(x, out, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < size, other=0).to(ACC)
    tl.store(out + place, softplus(value), mask=place < size)


@triton.jit(do_not_specialize=["size"])
def _softplus_backward_kernel(grad, out, grad_x, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(out + place, mask=place < size, other=0).to(ACC)
    slope = tl.load(grad + place, mask=place < size, other=0).to(ACC) * softplus_slope(value)
    tl.store(grad_x + place, slope, mask=place < size)


def _elementwise(kernel, *inputs: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(inputs[-1])
    acc = tl.float64 if out.dtype == torch.float64 else tl.float32
    launch(kernel, (triton.cdiv(out.numel(), BLOCK),), *inputs, out, out.numel(), BLOCK=BLOCK, ACC=acc)
    return out


def launch_softplus(x: torch.Tensor) -> torch.Tensor:
    """Launch softplus of a contiguous tensor."""
    return _elementwise(_softplus_kernel, x)


def launch_softplus_backward(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Launch the gradient of softplus from that of its value y; both are contiguous."""
    return _elementwise(_softplus_backward_kernel, grad, y)
