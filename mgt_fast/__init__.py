"""mgt-fast: the Multi-view Graph Transformer for crystals, compiled and fast."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import MGTConfig
    from .graph import CrystalGraph, build_graph, neighbor_list
    from .model import MGT
    from .outputs import EdgeNoise, MGTOutput
    from .structures import CrystalBatch

__version__ = "0.1.0"

__all__ = [
    "MGT",
    "CrystalBatch",
    "CrystalGraph",
    "EdgeNoise",
    "MGTConfig",
    "MGTOutput",
    "build_graph",
    "neighbor_list",
]

_MODULE_OF = {
    "MGT": "model",
    "CrystalBatch": "structures",
    "CrystalGraph": "graph",
    "EdgeNoise": "outputs",
    "MGTConfig": "config",
    "MGTOutput": "outputs",
    "build_graph": "graph",
    "neighbor_list": "graph",
}


def __getattr__(name: str):
    """Import public names at their first use: torch takes a second that `mgt-fast --help` need not wait."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'mgt_fast' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
