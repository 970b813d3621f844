"""From a dataset to what a run learns from: targets and parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..data.ingest import read_split
from ..data.store import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    from ..data import CrystalDataset
    from .config import DataConfig

PARTS = ("train", "val", "test")


class DataError(ValueError):
    """A dataset that cannot serve the run asked for."""


def target_values(dataset: CrystalDataset, target: str) -> np.ndarray:
    """Return a target of every crystal, (n,) float64, NaN where it is missing.

    Raises:
        DataError: if the dataset has no such target; the message lists those it has.
    """
    if target not in dataset.targets:
        available = ", ".join(sorted(dataset.targets)) or "none"
        raise DataError(f"the dataset has no target {target!r}; available: {available}")
    return np.asarray(dataset.targets[target], np.float64)


def select_parts(
    dataset: CrystalDataset, data: DataConfig, seed: int, usable: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return the crystals of each part as ascending indices.

    Args:
        dataset: the crystals.
        data: says whether the dataset's own parts or random ones are used, and how many crystals of each.
        seed: of random parts and of `data.limit`'s choice.
        usable: (n,) bool, the crystals that may be used at all; None for every one.

    Returns:
        Indices by part name. Parts of the dataset or of a file may include "", crystals of no part. Random
        parts are "train", "val" and "test": sizes are rounded down, what is left goes to "train".

    Raises:
        DataError: if the dataset lacks crystals that the split file names.
        PrepareError: as `data.ingest.read_split`.
    """
    rng = np.random.default_rng(seed)
    if data.fractions is None:
        if data.split_file is None:
            parts = {name: dataset.part(name) for name in sorted(SPLITS)}
        else:
            parts = file_parts(dataset, data.split_file)
        parts = {
            name: members if usable is None else members[usable[members]]
            for name, members in parts.items()
            if len(members)
        }
    else:
        chosen = np.arange(len(dataset)) if usable is None else np.flatnonzero(usable)
        shuffled = rng.permutation(chosen)
        n_val, n_test = (int(fraction * len(chosen) + 1e-9) for fraction in data.fractions[1:])
        n_train = len(chosen) - n_val - n_test
        cuts = np.split(shuffled, [n_train, n_train + n_val])
        parts = {name: np.sort(part) for name, part in zip(PARTS, cuts, strict=True)}
    if data.limit is not None:
        parts = {
            name: np.sort(rng.permutation(part)[: data.limit]) if len(part) > data.limit else part
            for name, part in parts.items()
        }
    return parts


def file_parts(dataset: CrystalDataset, path: Path) -> dict[str, np.ndarray]:
    """Return the crystals of each part by a split file, as ascending positions; "" those it does not name.

    Raises:
        DataError: if the dataset lacks crystals that it names.
        PrepareError: as `data.ingest.read_split`.
    """
    part_of = read_split(path)
    codes = np.zeros(len(dataset), np.int8)
    found = 0
    for position, name in enumerate(dataset.ids):
        if name in part_of:
            codes[position] = SPLITS.index(part_of[name])
            found += 1
    if found < len(part_of):
        absent = sorted(part_of.keys() - set(dataset.ids))
        raise DataError(
            f"{path}: {len(absent)} of its {len(part_of)} ids are not in the dataset {dataset.path} "
            f"({', '.join(absent[:10])}{', ...' if len(absent) > 10 else ''}); take them out of the file, or "
            "look in the dataset's rejects.csv why they are missing"
        )
    return {name: np.flatnonzero(codes == SPLITS.index(name)) for name in sorted(SPLITS)}


def require_part(
    parts: dict[str, np.ndarray],
    name: str,
    purpose: str,
    remedy: str = 'to draw random parts, pass --set "data.fractions=[0.8,0.1,0.1]"',
) -> np.ndarray:
    """Return the crystals of a part.

    Raises:
        DataError: if it has none; the message holds `purpose`, the parts there are, and `remedy`.
    """
    if len(parts.get(name, ())):
        return parts[name]
    sizes = ", ".join(f"{part or '(no part)'}: {len(indices)}" for part, indices in parts.items()) or "none"
    raise DataError(
        f"no crystal to {purpose}: part {name or '(no part)'!r} is empty (crystals by part: {sizes}); "
        f"{remedy}"
    )


def require_two(dataset: CrystalDataset, train: np.ndarray) -> None:
    """Raise DataError if there is only one crystal to learn from: batch normalisation needs two."""
    if len(train) == 1:
        raise DataError(
            f"the only crystal to learn from is {dataset.ids[train[0]]}; training needs at least 2"
        )
