"""Reader of datasets that `prepare` made: to join several, or with other inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..store import BUNDLED, MANIFEST, CrystalDataset, Target
from .base import Crystal, RawRecord

BUNDLED_NAME = "bundled"
_AT_ONCE = 4096


@dataclass(frozen=True)
class Stored:
    """The payload of a crystal that was checked when it was stored."""

    stored: Crystal

    def crystal(self) -> Crystal:
        """Return the crystal."""
        return self.stored


def dataset_folder(path: Path) -> Path | None:
    """Return the folder of the dataset that a path names, "bundled" among them; None if it names none."""
    if (path / MANIFEST).is_file():
        return path
    return BUNDLED if str(path) == BUNDLED_NAME and not path.exists() else None


def targets_of(folder: Path) -> dict[str, Target]:
    """Return the targets of a dataset, with their units."""
    return dict(CrystalDataset.open(folder).target_info)


def read(folder: Path) -> Iterator[RawRecord]:
    """Yield the crystals of a dataset with their targets and, as column `split`, their parts.

    Raises:
        DatasetError: if it is damaged.
    """
    dataset = CrystalDataset.open(folder)
    columns = {name: np.asarray(dataset.targets[name]) for name in dataset.targets}
    for first in range(0, len(dataset), _AT_ONCE):
        rows = np.arange(first, min(first + _AT_ONCE, len(dataset)))
        crystals, part = dataset.gather(rows), dataset.split[rows]
        ends = crystals.batch_ptr.tolist()
        arrays = [crystals.numbers.numpy(), crystals.frac_coords.numpy()]
        for b, row in enumerate(rows.tolist()):
            numbers, frac_coords = (array[ends[b] : ends[b + 1]] for array in arrays)
            crystal = Crystal(numbers, frac_coords, crystals.cell[b].numpy(), crystals.pbc[b].numpy())
            values = {name: float(column[row]) for name, column in columns.items()}
            targets = {name: None if np.isnan(value) else value for name, value in values.items()}
            name = dataset.ids[row]
            yield RawRecord(f"{folder}: {name}", name, Stored(crystal), {**targets, "split": str(part[b])})
