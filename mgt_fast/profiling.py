"""Named ranges of a run, which profilers show; nothing is recorded until `recording` switches them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch.profiler import record_function

DOMAIN = "mgt_fast"
"""NVTX domain of the ranges, and what their names begin with in a trace of torch.profiler."""

TOOLS = ("trace", "nvtx")

_NOTHING = nullcontext()  # torch.compile knows it
_begin: Callable[[str], AbstractContextManager] | None = None


def span(name: str) -> AbstractContextManager:
    """Return a context manager whose block is a range called `name`; ranges may lie in one another.

    Off, it tests one variable and makes no object. On, it does host work alone, so that the block may be
    captured in a CUDA graph (whose replays then show no ranges inside) and differentiated. Inside what
    torch.compile compiles there are no ranges.
    """
    if _begin is None or torch.compiler.is_compiling():
        return _NOTHING
    return _begin(name)


@contextmanager
def recording(tool: Literal["trace", "nvtx"]) -> Iterator[None]:
    """Switch ranges on inside the block, in every thread.

    Args:
        tool: who sees them: "trace", torch.profiler, on any device; "nvtx", NVIDIA's profilers.

    Raises:
        ValueError: for another tool.
        ImportError: if NVTX is asked for and not installed.
    """
    global _begin
    if tool not in TOOLS:
        raise ValueError(f"tool = {tool!r}; choose one of {', '.join(TOOLS)}")
    before, _begin = _begin, _traced if tool == "trace" else _nvtx()
    try:
        yield
    finally:
        _begin = before


def _traced(name: str) -> record_function:
    return record_function(f"{DOMAIN}/{name}")


def _nvtx() -> Callable[[str], AbstractContextManager]:
    """Return what makes NVTX ranges; torch's own have no domain."""
    try:
        import nvtx
    except ImportError as error:
        raise ImportError("NVTX ranges need the package nvtx: pip install 'mgt-fast[cuda]'") from error
    return lambda name: nvtx.annotate(name, domain=DOMAIN)
