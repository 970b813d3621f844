"""mgt-fast: the Multi-view Graph Transformer for crystals, compiled and fast."""

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
