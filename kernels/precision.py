"""Which numbers the kernels multiply; sums and statistics are always kept in float32 or better."""

from __future__ import annotations

import torch


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Type that matrix products take their factors in: bfloat16 under autocast, else that of `x`.

    Raises:
        ValueError: under autocast to another type, which the kernels do not have.
    """
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    dtype = torch.get_autocast_dtype(x.device.type)
    if dtype != torch.bfloat16:
        raise ValueError(f"autocast to {dtype}; the kernels know torch.bfloat16 alone")
    return dtype


def dot_precision() -> str:
    """Triton's `input_precision` for float32 factors, as `torch.set_float32_matmul_precision` asks.

    "highest" splits each factor into three TF32 numbers, which keeps float32's accuracy on tensor cores.
    """
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of sums and statistics over values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
