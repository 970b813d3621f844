"""The gate that both attention layers share: value times sigmoid of a batch-normalised product."""

from .reference import gated_sum

__all__ = ["gated_sum"]
