"""Crystals on disk: the dataset format, the bundled set, and the ingest of other formats."""

from mgt_fast.data.ingest import PrepareSummary, prepare
from mgt_fast.data.readers.base import PrepareError
from mgt_fast.data.store import CrystalDataset, DatasetError, DatasetWriter, Target

__all__ = [
    "CrystalDataset",
    "DatasetError",
    "DatasetWriter",
    "PrepareError",
    "PrepareSummary",
    "Target",
    "prepare",
]
