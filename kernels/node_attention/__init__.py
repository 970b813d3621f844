"""The node-wise attention of both encoders: every atom attends to its edges."""

from .reference import node_attention

__all__ = ["node_attention"]
