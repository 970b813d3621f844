"""The crystals' names, decoded when somebody asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch


class _Names(Sequence):
    """What both sequences share: they compare and print like the tuple of their names."""

    def __eq__(self, other):
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and tuple(self) == tuple(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} names)"

    def __reduce__(self):
        return tuple, (list(self),)


class DatasetIds(_Names):
    """The ids of all crystals of a dataset, where they stand in its shards."""

    def __init__(self, columns: Sequence[pa.StringArray]):
        self._columns = columns
        self._shard_ptr = np.cumsum([0, *(len(column) for column in columns)])

    def take(self, indices: np.ndarray) -> tuple[str, ...]:
        """Return the ids of the crystals at `indices`, (B,) int64 from 0 to len - 1."""
        shard = np.searchsorted(self._shard_ptr, indices, side="right") - 1
        rows = indices - self._shard_ptr[shard]
        columns = self._columns
        # One by one: a batch has few crystals of any one shard.
        return tuple(columns[s][row].as_py() for s, row in zip(shard.tolist(), rows.tolist(), strict=True))

    def __len__(self) -> int:
        return int(self._shard_ptr[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self.take(np.arange(len(self))[index]))
        return self.take(np.array([range(len(self))[index]]))[0]

    def __iter__(self) -> Iterator[str]:
        for column in self._columns:
            for start in range(0, len(column), 2**16):
                yield from column.slice(start, 2**16).to_pylist()


class ChosenIds(_Names):
    """The ids of a batch: read on first use, since a training step needs none of them.

    Args:
        ids: of the dataset.
        indices: the batch's crystals, (B,) int64; on a device they are fetched on first use.
    """

    def __init__(self, ids: DatasetIds, indices: np.ndarray | torch.Tensor):
        self._ids = ids
        self._indices = indices
        self._names: tuple[str, ...] | None = None

    def _decoded(self) -> tuple[str, ...]:
        if self._names is None:
            indices = self._indices
            self._names = self._ids.take(
                indices.cpu().numpy() if isinstance(indices, torch.Tensor) else indices
            )
        return self._names

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index):
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())
