"""Activations and their slopes as Triton functions, for kernels that end or begin with one."""

from __future__ import annotations

import triton
import triton.language as tl


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
