"""Named ranges of a run, which profilers show; nothing is recorded until `recording` switches them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any, Literal

import torch
from torch import nn
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


def layers(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's parts by name: its children, and in turn those of each part that has a list."""
    for name, child in model.named_children():
        path = f"{prefix}{name.removesuffix('_graph_encoder')}"
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from layers(child, f"{path}.")
        else:
            yield path, child
            if any(isinstance(part, nn.ModuleList) for part in child.children()):
                yield from layers(child, f"{path}.")


@contextmanager
def layer_ranges(model: nn.Module, *, backward: bool = False) -> Iterator[None]:
    """Make the forward pass of each of a model's `layers` a range inside the block.

    The model calls no `span` for it: hooks are put on its layers, and taken off in the end.

    Args:
        model: the model.
        backward: make backward passes ranges as well, for tools that cannot tell whose nodes these are. They
            follow one another: "x backward" begins with the gradient of what x returned, and ends where the
            next begins.
    """
    hooks, passes = [], _BackwardRanges()
    for name, layer in layers(model):
        opened: list[AbstractContextManager] = []

        def begin(_layer, _inputs, name=name, opened=opened):
            opened.append(span(name))
            opened[-1].__enter__()

        def end(_layer, _inputs, result, name=name, opened=opened):
            opened.pop().__exit__(None, None, None)
            if backward:
                passes.begin_at(result, f"{name} backward")

        hooks.append(layer.register_forward_pre_hook(begin))
        hooks.append(layer.register_forward_hook(end, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _BackwardRanges:
    """Ranges that follow one another on the thread of a backward pass."""

    def __init__(self):
        self.name: str | None = None
        self.current: AbstractContextManager = _NOTHING

    def begin_at(self, result: Any, name: str):
        """Begin a range when the gradient of a result is there; once for each result."""
        for node in filter(None, (tensor.grad_fn for tensor in _tensors(result))):
            if node.metadata.setdefault(DOMAIN, name) == name:
                node.register_prehook(lambda _gradients: self._begin(name))

    def _begin(self, name: str):
        if self.name is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        elif self.name == name:
            return
        self.current.__exit__(None, None, None)
        self.name, self.current = name, span(name)
        self.current.__enter__()

    def _end(self):
        self.current.__exit__(None, None, None)
        self.name, self.current = None, _NOTHING


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in what a layer returned."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from _tensors(part)
    elif is_dataclass(result):
        yield from _tensors(list(vars(result).values()))
