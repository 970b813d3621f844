"""Linear layer of a radial-basis expansion, through the basis' local support."""

from .reference import rbf_linear

__all__ = ["rbf_linear"]
