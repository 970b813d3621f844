"""From a dataset to batches of graphs: parts, shuffling, and graphs built on the fly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..graph import CrystalGraph, network_input

if TYPE_CHECKING:
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
        Indices by part name. The dataset's own parts may include "", crystals of no part. Random parts are
        "train", "val" and "test": sizes are rounded down, what is left goes to "train".
    """
    rng = np.random.default_rng(seed)
    chosen = np.arange(len(dataset)) if usable is None else np.flatnonzero(usable)
    if data.fractions is None:
        parts = {str(name): chosen[dataset.split[chosen] == name] for name in np.unique(dataset.split)}
    else:
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


def split_evenly(n: int, batch_size: int, smallest: int = 1) -> list[int]:
    """Return batch sizes that add up to n and differ by at most one, so that no batch is a small rest.

    Args:
        n: samples.
        batch_size: largest batch.
        smallest: no batch is smaller than this (batch normalisation cannot learn from one row), even if one
            must then hold one sample more than `batch_size`; it matters for odd n and batches of two alone.
    """
    n_batches = max(1, min(-(-n // batch_size), n // smallest))
    small, larger = divmod(n, n_batches)
    return [small + 1] * larger + [small] * (n_batches - larger)


@dataclass(frozen=True)
class GraphSource:
    """Builds the graphs of chosen crystals of a dataset for a network on `device`, in float32."""

    dataset: CrystalDataset
    max_neighbors: int
    compat: str | None
    device: torch.device

    def graph(self, indices: Sequence[int] | np.ndarray) -> CrystalGraph:
        """Return the graphs of the crystals `indices` as one batch; see `graph.network_input`."""
        crystals = self.dataset.gather(indices)
        return network_input(crystals, self.device, max_neighbors=self.max_neighbors, compat=self.compat)

    def in_order(self, indices: np.ndarray, batch_size: int) -> Iterator[CrystalGraph]:
        """Yield the graphs of all crystals `indices`, in their order."""
        start = 0
        for size in split_evenly(len(indices), batch_size) if len(indices) else []:
            yield self.graph(indices[start : start + size])
            start += size


def shuffled_batches(
    indices: np.ndarray, batch_size: int, seed: int, epoch: int, smallest: int = 2
) -> list[np.ndarray]:
    """Return every index once, in batches, in an order that seed and epoch alone decide."""
    order = np.random.default_rng((seed, epoch)).permutation(indices)
    return np.split(order, np.cumsum(split_evenly(len(order), batch_size, smallest))[:-1])
