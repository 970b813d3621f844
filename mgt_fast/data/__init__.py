"""Crystals on disk: the dataset format, the bundled set, and the ingest of other formats."""

from .ingest import PrepareSummary, prepare
from .readers.base import PrepareError
from .store import CrystalDataset, DatasetError, DatasetWriter, Target

__all__ = [
    "CrystalDataset",
    "DatasetError",
    "DatasetWriter",
    "PrepareError",
    "PrepareSummary",
    "Target",
    "prepare",
]
