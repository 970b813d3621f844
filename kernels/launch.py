"""How Triton kernels are started, and how a test sees which were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs in its interpreter, on CPU tensors; it reads the same variable at its import."""


CHANNELS = tuple(2**power for power in range(4, 10))
"""Channel counts the Triton kernels have tiles for."""


def check_channels(channels: int, name: str = "channels"):
    """Raise ValueError if there are no tiles for so many channels."""
    if channels not in CHANNELS:
        raise ValueError(
            f"{channels} {name}; the Triton kernels have {', '.join(map(str, CHANNELS))}: choose one of "
            "these or backend='torch'"
        )


@dataclass(frozen=True)
class Launch:
    """One kernel start: enough to compile the kernel as it is shipped, without a GPU.

    Attributes:
        kernel: the `triton.jit` function.
        args: its arguments in order; a tensor stands as its dtype.
        constants: its compile-time arguments.
        options: `num_warps` and `num_stages`.
    """

    kernel: object
    args: tuple
    constants: dict
    options: dict

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.fn.__name__


@dataclass(frozen=True, eq=False)
class _Watcher:
    seen: list[Launch]
    run: bool
    arch: int | None


_watchers: list[_Watcher] = []


@contextmanager
def watch_launches(*, run: bool = True, arch: int | None = None) -> Iterator[list[Launch]]:
    """List every launch inside the block.

    Args:
        run: whether the kernels run as well.
        arch: compute capability to choose tiles for instead of the device's, 80 or 90.
    """
    watcher = _Watcher([], run, arch)
    _watchers.append(watcher)
    try:
        yield watcher.seen
    finally:
        _watchers.remove(watcher)


def can_launch(device: torch.device) -> bool:
    """Whether kernels can work on tensors of this device, or need not because they are only listed."""
    return device.type == "cuda" or INTERPRETED or any(not watcher.run for watcher in _watchers)


def target_arch(device: torch.device) -> int:
    """Compute capability that kernels are chosen for: 90 for 9.0; 0 in the interpreter."""
    for watcher in _watchers:
        if watcher.arch is not None:
            return watcher.arch
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel, grid: tuple[int, ...], *args, num_warps: int = 4, num_stages: int = 2, **constants):
    """Start a `triton.jit` kernel over `grid`; a grid without programs starts nothing.

    Args:
        kernel: the kernel.
        grid: number of programs along each axis.
        args: tensors, integers, floats and None, in the kernel's order.
        num_warps: warps a program.
        num_stages: depth of software pipelining.
        constants: the kernel's compile-time arguments.
    """
    for watcher in _watchers:
        described = tuple(arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        watcher.seen.append(Launch(kernel, described, constants, options))
    if 0 in grid or not all(watcher.run for watcher in _watchers):
        return
    device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
