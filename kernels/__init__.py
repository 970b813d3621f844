"""The operations that carry the model's arithmetic.

Each folder is one operation: `__init__.py` is its public face, `reference.py` the plain PyTorch code that is
the CPU path and the oracle of every other backend, `triton.py` the compiled kernels and their launchers.
`segments.py` (which rows belong together), `activations.py`, `precision.py` and `launch.py` are what they
share.
"""

from __future__ import annotations

import importlib.util

import torch

from .launch import can_launch

BACKENDS = ("torch", "triton")


def check_backend(backend: str) -> str:
    """Return `backend` if there is such a one, and raise ValueError otherwise."""
    if backend not in (*BACKENDS, "auto"):
        raise ValueError(f"backend = {backend!r}; choose one of auto, {', '.join(BACKENDS)}")
    return backend


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Decide what computes on `device`, and raise if it cannot: nothing falls back silently.

    Args:
        backend: "torch", "triton", or "auto": Triton on a CUDA device, PyTorch elsewhere.
        device: where the data are.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if Triton is wanted and not installed, or if it cannot compute on `device`.
    """
    device = torch.device(device)
    if check_backend(backend) == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed: pip install 'mgt-fast[cuda]', or choose backend='torch'")
    if not can_launch(device):
        raise RuntimeError(
            f"Triton kernels need a CUDA device and the data are on {device}: move them, or choose "
            "backend='torch' (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly, for tests)"
        )
    return "triton"
