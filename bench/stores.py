"""The same crystals in several stores, and how each reads a batch: the rivals of `CrystalDataset.gather`.

Every reader returns what the neighbour list needs, as tensors: atomic numbers (N,) int64, fractional
coordinates (N, 3) and cells (B, 3, 3) float64, periodicity (B, 3) bool, and the first atom of each crystal
(B + 1,).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mgt_fast.data import CrystalDataset, DatasetWriter
from mgt_fast.data.store import record_batch

MEAN_ATOMS = 10
PIECE = 20_000  # crystals made at a time
Reader = Callable[[np.ndarray], tuple[torch.Tensor, ...]]


def synthetic(count: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield numbers, coordinates, cells and atoms of made-up crystals, ten atoms on average, in pieces."""
    rng = np.random.default_rng(0)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        num_atoms = 1 + rng.poisson(MEAN_ATOMS - 1, size)
        numbers = rng.integers(1, 84, num_atoms.sum())
        cells = 5 * np.eye(3) + rng.normal(scale=0.5, size=(size, 3, 3))
        yield numbers, rng.random((len(numbers), 3)), cells, num_atoms


def write_dataset(path: Path, count: int, shard_size: int) -> Path:
    """Write the crystals with the project's writer."""
    written = 0
    with DatasetWriter(path, {}, shard_size=shard_size) as writer:
        for numbers, coords, cells, num_atoms in synthetic(count):
            ends, size = np.cumsum(num_atoms)[:-1], len(num_atoms)
            writer.write(
                record_batch(
                    [f"crystal-{written + n:09d}" for n in range(size)],
                    np.split(numbers, ends),
                    np.split(coords, ends),
                    cells,
                    np.ones((size, 3), dtype=bool),
                    ["train"] * size,
                    {},
                )
            )
            written += size
    return path


def packed(parts: list[tuple]) -> tuple[torch.Tensor, ...]:
    """Put crystals (numbers, coordinates, cell, periodicity) side by side into a batch."""
    numbers, coords, cells, pbc = zip(*parts, strict=True)
    ptr = np.concatenate(([0], np.cumsum([len(z) for z in numbers])))
    arrays = np.concatenate(numbers).astype(np.int64), np.concatenate(coords), np.stack(cells), np.stack(pbc)
    return tuple(torch.from_numpy(x) for x in (*arrays, ptr))


def ours(path: Path) -> Reader:
    """Our own gather."""
    dataset = CrystalDataset.open(path, verify=False)

    def read(indices):
        batch = dataset.gather(indices)
        return batch.numbers, batch.frac_coords, batch.cell, batch.pbc, batch.batch_ptr

    return read


def arrow_take(path: Path) -> Reader:
    """Arrow's `take` on the same shards, mapped into memory."""
    shards = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in sorted(path.glob("*.arrow"))]
    table = pa.concat_tables(shards).select(["numbers", "frac_coords", "cell", "pbc"])

    def read(indices):
        taken = table.take(pa.array(indices)).combine_chunks()
        numbers, coords, cell, pbc = (column.combine_chunks() for column in taken.columns)
        return (
            torch.from_numpy(numbers.flatten().to_numpy().astype(np.int64)),
            torch.from_numpy(coords.flatten().to_numpy().reshape(-1, 3).copy()),
            torch.from_numpy(cell.flatten().to_numpy().reshape(-1, 3, 3).copy()),
            torch.from_numpy((pbc.to_numpy()[:, None] >> np.arange(3, dtype=np.uint8) & 1).astype(bool)),
            torch.from_numpy(np.asarray(numbers.offsets, dtype=np.int64)),
        )

    return read


class Samples(Dataset):
    """A crystal at a time, from arrays that lie in memory."""

    def __init__(self, path: Path):
        batch = CrystalDataset.open(path, verify=False)
        batch = batch.gather(np.arange(len(batch)))
        self.ptr = batch.batch_ptr.tolist()
        self.columns = batch.numbers.numpy(), batch.frac_coords.numpy(), batch.cell.numpy(), batch.pbc.numpy()

    def __len__(self):
        return len(self.ptr) - 1

    def __getitem__(self, index):
        numbers, coords, cell, pbc = self.columns
        atoms = slice(self.ptr[index], self.ptr[index + 1])
        return numbers[atoms], coords[atoms], cell[index], pbc[index]


def data_loader(path: Path) -> Reader:
    """PyTorch's own way: a Dataset of samples in memory and a DataLoader that puts them together."""
    samples = Samples(path)

    def read(indices):
        return next(iter(DataLoader(samples, batch_sampler=[indices.tolist()], collate_fn=packed)))

    return read


def memory_map(path: Path) -> Reader:
    """NumPy files mapped into memory, one slice a crystal."""
    folder = path.with_name(f"{path.name}-numpy")
    if not folder.exists():
        samples = Samples(path)
        folder.mkdir()
        for name, column in zip(("numbers", "coords", "cell", "pbc"), samples.columns, strict=True):
            np.save(folder / name, column)
        np.save(folder / "ptr", np.array(samples.ptr))
    names = ("numbers", "coords", "cell", "pbc", "ptr")
    mapped = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in names)
    numbers, coords, cell, pbc, ptr = (array.view(np.ndarray) for array in mapped)  # whose slices cost less

    def read(indices):
        return packed(
            [(numbers[ptr[i] : ptr[i + 1]], coords[ptr[i] : ptr[i + 1]], cell[i], pbc[i]) for i in indices]
        )

    return read


def lmdb(path: Path) -> Reader:
    """A pickled crystal a record of LMDB, as the Open Catalyst datasets are stored."""
    library = pytest.importorskip("lmdb")
    folder = path.with_name(f"{path.name}-lmdb")
    if not folder.exists():
        samples = Samples(path)
        with library.open(str(folder), map_size=2**32, sync=False) as store, store.begin(write=True) as batch:
            for n in range(len(samples)):
                batch.put(str(n).encode(), pickle.dumps(samples[n], protocol=5))
    reading = library.open(str(folder), readonly=True, lock=False, readahead=False).begin(buffers=True)

    def read(indices):
        return packed([pickle.loads(reading.get(str(n).encode())) for n in indices.tolist()])

    return read


RIVALS = (arrow_take, data_loader, memory_map, lmdb)
