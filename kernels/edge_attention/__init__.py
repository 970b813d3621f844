"""The SE(3) encoder's edge-wise attention: every edge attends to the three lattice directions."""

from .reference import edge_attention

__all__ = ["edge_attention"]
