"""The dataset format: Arrow IPC shards that map into memory, and a manifest that guards them.

A dataset is a folder with `manifest.json` (see `manifest`) and shards `shard-00000.arrow`, ... Each shard is
an uncompressed Arrow IPC file of one record batch, so that every column is one contiguous buffer; pandas and
polars read it.

    column       Arrow type                  meaning
    id           string                      unique name of the crystal
    numbers      list<uint8>                 atomic numbers
    frac_coords  list<double>                fractional coordinates, three an atom, inside the cell or not
    cell         fixed_size_list<double>[9]  lattice vectors as rows, Å
    pbc          uint8                       bit i: periodic along lattice vector i
    split        dictionary<string>          "train", "val", "test" or "" (in none of them)
    <target>     double, nullable            one column a target; null where it is not known

Files `edges-<max_neighbors>.arrow` may stand beside them; see `counts`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from .. import _C
from ..structures import MAX_ATOMIC_NUMBER, CrystalBatch
from .ids import ChosenIds, DatasetIds
from .manifest import (
    MANIFEST,
    RESTORE,
    DatasetError,
    Target,
    check_files,
    hash_file,
    read_manifest,
    write_manifest,
)

SPLITS = ("", "train", "val", "test")
BUNDLED = Path(__file__).parent / "bundled" / "dataset"
DEFAULT_SHARD_SIZE = 2**18
MAX_SHARD_ATOMS = 2**29  # three coordinates each must stay within Arrow's 32-bit list offsets

STRUCTURE_FIELDS = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("numbers", pa.list_(pa.uint8()), nullable=False),
    pa.field("frac_coords", pa.list_(pa.float64()), nullable=False),
    pa.field("cell", pa.list_(pa.float64(), 9), nullable=False),
    pa.field("pbc", pa.uint8(), nullable=False),
    pa.field("split", pa.dictionary(pa.int8(), pa.string()), nullable=False),
)
EDGE_COUNTS_SCHEMA = pa.schema([pa.field("num_edges", pa.int32())])


def dataset_schema(targets: Sequence[str]) -> pa.Schema:
    """Return the Arrow schema of a shard with these target columns."""
    reserved = {field.name for field in STRUCTURE_FIELDS} & set(targets)
    if reserved:
        raise DatasetError(f"target {min(reserved)!r} has the name of a structure column; rename it")
    return pa.schema([*STRUCTURE_FIELDS, *(pa.field(name, pa.float64()) for name in targets)])


def record_batch(
    ids: Sequence[str],
    numbers: Sequence[np.ndarray],
    frac_coords: Sequence[np.ndarray],
    cell: np.ndarray,
    pbc: np.ndarray,
    split: Sequence[str],
    targets: Mapping[str, Sequence[float]],
) -> pa.RecordBatch:
    """Pack n crystals into one record batch of the dataset's schema.

    Args:
        ids: n unique names.
        numbers: n arrays of atomic numbers.
        frac_coords: n arrays of fractional coordinates, (atoms, 3) each.
        cell: lattice vectors as rows, (n, 3, 3), Å.
        pbc: periodicity, (n, 3) bool.
        split: n of "train", "val", "test", "".
        targets: n values each; NaN where missing.
    """
    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(z) for z in numbers], out=offsets[1:])
    flat_numbers = np.concatenate([np.empty(0), *numbers]).astype(np.uint8)
    flat_coords = np.concatenate([np.empty((0, 3)), *frac_coords]).astype(np.float64).ravel()
    codes = np.array([SPLITS.index(part) for part in split], dtype=np.int8)
    columns = [
        pa.array(ids, pa.string()),
        pa.ListArray.from_arrays(offsets, flat_numbers),
        pa.ListArray.from_arrays(3 * offsets, flat_coords),
        pa.FixedSizeListArray.from_arrays(np.asarray(cell, dtype=np.float64).ravel(), 9),
        pa.array(np.packbits(np.asarray(pbc, dtype=bool).reshape(-1, 3), axis=1, bitorder="little").ravel()),
        pa.DictionaryArray.from_arrays(codes, list(SPLITS)),
        *(pa.array(np.asarray(values, dtype=np.float64), from_pandas=True) for values in targets.values()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=dataset_schema(list(targets)))


class DatasetWriter:
    """Writes a dataset folder; it appears under its name only when it is complete.

    A context manager: shards go to a temporary folder beside `path`, which is renamed when the block ends and
    removed when it fails. The caller may put files of its own into `folder` before that.

    Args:
        path: folder to make.
        targets: what each target column holds, in the order of the columns.
        shard_size: crystals a shard.
        overwrite: replace an existing dataset.

    Raises:
        DatasetError: if `path` exists and `overwrite` is not set, or what stands there is no dataset.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        targets: Mapping[str, Target],
        *,
        shard_size: int = DEFAULT_SHARD_SIZE,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        self.targets = dict(targets)
        self.schema = dataset_schema(list(targets))
        if shard_size < 1:
            raise DatasetError(f"shard_size = {shard_size}; it must be at least 1")
        self.shard_size = shard_size
        check_output(self.path, overwrite)
        self.folder = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._shards: list[dict] = []
        self._edge_counts: list[dict] = []
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        self._pending_atoms = 0

    def __enter__(self) -> DatasetWriter:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if error_type is None:
            self._finish()
        else:
            shutil.rmtree(self.folder)

    def write(self, batch: pa.RecordBatch) -> None:
        """Append crystals; ids must be unique over the whole dataset (the caller sees to it)."""
        while batch.num_rows:
            room = self.shard_size - self._pending_rows
            part, batch = batch.slice(0, room), batch.slice(room)
            self._pending.append(part)
            self._pending_rows += part.num_rows
            self._pending_atoms += len(part.column("numbers").flatten())
            if self._pending_rows == self.shard_size or self._pending_atoms > MAX_SHARD_ATOMS:
                self._flush()

    def written(self) -> CrystalDataset:
        """Return what has been written so far, to look at before it appears under its name."""
        self._flush()
        shards = [_open_shard(self.folder / entry["file"], entry, self.schema) for entry in self._shards]
        return CrystalDataset(self.folder, shards, self.targets)

    def add_edge_counts(self, counts: np.ndarray, max_neighbors: int, shell_tolerance: float) -> None:
        """Store how many edges the graph of each crystal has; see `counts`.

        Args:
            counts: one a crystal of the whole dataset, (n,); 0 where there is no graph, stored as null.
            max_neighbors, shell_tolerance: of the graphs.
        """
        name = f"edges-{max_neighbors}.arrow"
        column = pa.array(counts.astype(np.int32), mask=counts == 0)
        self._write_file(name, pa.RecordBatch.from_arrays([column], schema=EDGE_COUNTS_SCHEMA))
        self._edge_counts.append(
            {
                "file": name,
                "sha256": hash_file(self.folder / name),
                "max_neighbors": max_neighbors,
                "shell_tolerance": shell_tolerance,
            }
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f"shard-{len(self._shards):05d}.arrow"
        self._write_file(name, pa.concat_batches(self._pending))
        self._shards.append(
            {
                "file": name,
                "sha256": hash_file(self.folder / name),
                "crystals": self._pending_rows,
                "atoms": self._pending_atoms,
            }
        )
        self._pending, self._pending_rows, self._pending_atoms = [], 0, 0

    def _write_file(self, name: str, batch: pa.RecordBatch) -> None:
        sink = pa.OSFile(str(self.folder / name), "wb")
        with sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def _finish(self) -> None:
        self._flush()
        write_manifest(self.folder, self.targets, self._shards, self._edge_counts)
        if self.path.exists():
            replaced = self.path.with_name(f".{self.path.name}.{os.getpid()}.replaced")
            self.path.rename(replaced)
            self.folder.rename(self.path)
            shutil.rmtree(replaced)
        else:
            self.folder.rename(self.path)


def check_output(path: Path, overwrite: bool) -> None:
    """Raise DatasetError unless a dataset may be written to `path`."""
    if not path.exists():
        return
    if not overwrite:
        raise DatasetError(
            f"{path} exists already; choose another name or overwrite it (--overwrite, overwrite=True)"
        )
    if not (path / MANIFEST).is_file():
        raise DatasetError(f"{path} is no dataset (it has no {MANIFEST}) and is not overwritten; remove it")


class CrystalDataset:
    """Crystals and their targets on disk, mapped into memory; made by `open`.

    Attributes:
        path: the dataset's folder.
        ids: the crystals' names, a sequence of str.
        num_atoms: atoms of each crystal, (n,) int32.
        targets: target name to values, (n,) float64, NaN where missing; each is read when first asked for.
        target_info: target name to its unit and description.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[pa.RecordBatch],
        target_info: Mapping[str, Target],
        edge_counts: Mapping[tuple[int, float], np.ndarray] | None = None,
    ):
        self.path = path
        self.target_info = dict(target_info)
        self.ids = DatasetIds([shard.column("id") for shard in shards])
        self.targets = _Targets({name: [shard.column(name) for shard in shards] for name in target_info})
        self.num_atoms = _joined(
            [shard.column("numbers").value_lengths().to_numpy() for shard in shards], np.int32
        )
        self._parts = _joined([_split_codes(shard.column("split")) for shard in shards], np.int8)
        self._edge_counts = dict(edge_counts or {})
        self._reader = _C.CrystalReader(
            [
                (
                    shard.column("numbers").offsets.to_numpy(),
                    shard.column("numbers").values.to_numpy(),
                    shard.column("frac_coords").values.to_numpy(),
                    shard.column("cell").values.to_numpy(),
                    shard.column("pbc").to_numpy(),
                )
                for shard in shards
            ]
        )

    @classmethod
    def open(cls, path: str | os.PathLike | None = None, *, verify: bool = True) -> CrystalDataset:
        """Open a dataset folder, or with None the bundled set of Materials Project crystals.

        A file must not be changed while it is open: it is mapped, not copied.

        Args:
            path: the folder.
            verify: compare every file's SHA-256 with the manifest (about a second a core for 2 GB). Without
                it a changed value may go unnoticed; what would lead outside a file never does.

        Raises:
            DatasetError: if the folder is no dataset of this version, or a file is missing, damaged,
                truncated or not the one that was written; the message names the file.
        """
        path = BUNDLED if path is None else Path(path)
        manifest = read_manifest(path)
        check_files(path, [*manifest["shards"], *manifest["edge_counts"]], verify)
        schema = dataset_schema(list(manifest["targets"]))
        shards = [_open_shard(path / entry["file"], entry, schema) for entry in manifest["shards"]]
        dataset = cls(path, shards, manifest["targets"])
        for entry in manifest["edge_counts"]:
            key = entry["max_neighbors"], entry["shell_tolerance"]
            dataset._edge_counts[key] = _open_counts(path / entry["file"], key[0], dataset.num_atoms)
        return dataset

    def __len__(self) -> int:
        return len(self.num_atoms)

    @property
    def target_units(self) -> dict[str, str]:
        """Unit of each target."""
        return {name: target.unit for name, target in self.target_info.items()}

    @property
    def split(self) -> np.ndarray:
        """The part of each crystal, "train", "val", "test" or "", (n,) str; 20 bytes a crystal, made anew."""
        return np.array(SPLITS)[self._parts]

    def part(self, name: str) -> np.ndarray:
        """Return the crystals of the part "train", "val", "test" or "" as ascending positions, (k,) int64."""
        if name not in SPLITS:
            raise ValueError(f"part {name!r}; the parts are {', '.join(map(repr, SPLITS))}")
        return np.flatnonzero(self._parts == SPLITS.index(name))

    def gather(self, indices) -> CrystalBatch:
        """Read the crystals at `indices`, in that order.

        Args:
            indices: positions in the dataset, (B,) integers from 0 to len - 1; they may repeat.

        Raises:
            IndexError: for a position outside the dataset.
            TypeError: if `indices` are not whole numbers.
        """
        indices = whole_numbers(indices)
        try:
            arrays = self._reader.gather(indices)
        except RuntimeError as error:
            raise DatasetError(f"{self.path}: {error}; {RESTORE}") from error
        return CrystalBatch(
            **{name: torch.from_numpy(array) for name, array in arrays.items()},
            ids=ChosenIds(self.ids, indices),
        )

    def stored_edge_counts(self, max_neighbors: int, shell_tolerance: float) -> np.ndarray | None:
        """Return the edges of each crystal's graph, (n,) int32, 0 for no graph, or None if not stored."""
        return self._edge_counts.get((max_neighbors, shell_tolerance))


def whole_numbers(indices) -> np.ndarray:
    """Return a copy of indices as int64; TypeError if they are not whole numbers."""
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu" and indices.size:
        raise TypeError(f"indices are {indices.dtype}, expected whole numbers (for a mask: np.flatnonzero)")
    return indices.astype(np.int64)


class _Targets(Mapping):
    """Columns of targets by name, each joined from its shards when it is first asked for."""

    def __init__(self, columns: Mapping[str, list[pa.DoubleArray]]):
        self._columns = columns
        self._values: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values:
            pieces = [column.to_numpy(zero_copy_only=False) for column in self._columns[name]]
            self._values[name] = np.concatenate([np.empty(0), *pieces])
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


def _split_codes(column: pa.DictionaryArray) -> np.ndarray:
    """Return the part of each crystal as its place in SPLITS, (n,) int8; the file's own codes if they are."""
    codes, names = column.indices.to_numpy(), column.dictionary.to_pylist()
    if names == list(SPLITS):
        return codes
    return np.array([SPLITS.index(name) for name in names], np.int8)[codes]


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    """Return the shards' pieces of a column as one array; a single one as it is, where it lies."""
    return pieces[0] if len(pieces) == 1 else np.concatenate([np.empty(0, dtype), *pieces])


def _open_table(file: Path, schema: pa.Schema) -> pa.RecordBatch:
    """Map an Arrow file of one record batch and check all that later reads rely on."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.num_record_batches != 1 or not reader.schema.equals(schema):
            raise DatasetError(f"{file} does not have the columns that the manifest says; {RESTORE}")
        table = reader.get_batch(0)
        table.validate(full=True)  # offsets, lengths of buffers, dictionaries, UTF-8
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise DatasetError(f"{file} cannot be read ({error}); {RESTORE}") from error
    return table


def _open_shard(file: Path, entry: dict, schema: pa.Schema) -> pa.RecordBatch:
    shard = _open_table(file, schema)
    fields = [shard.column(field.name) for field in STRUCTURE_FIELDS]
    _, numbers, frac_coords, cell, pbc, split = fields
    expected = (entry["crystals"], entry["atoms"])
    found = (shard.num_rows, len(numbers.values))
    if found != expected:
        raise DatasetError(
            f"{file} holds {found[0]} crystals with {found[1]} atoms, the manifest says "
            f"{expected[0]} with {expected[1]}; {RESTORE}"
        )
    first_atom, first_coord = (
        column.offsets.to_numpy().astype(np.int64) for column in (numbers, frac_coords)
    )
    lists = (numbers, frac_coords, cell)
    sound = (
        not any(column.null_count for column in (*fields, *(column.values for column in lists)))
        and (first_atom[0], first_atom[-1]) == (0, found[1])
        and np.diff(first_atom).min(initial=1) >= 1
        and set(split.dictionary.to_pylist()) <= set(SPLITS)
        and np.array_equal(3 * first_atom, first_coord)
        and len(frac_coords.values) == 3 * found[1]
        and len(cell.values) == 9 * found[0]
        and pbc.to_numpy().max(initial=0) < 8
        and numbers.values.to_numpy().min(initial=1) >= 1
        and numbers.values.to_numpy().max(initial=1) <= MAX_ATOMIC_NUMBER
    )
    if not sound:
        raise DatasetError(f"{file} is damaged: its columns do not fit together; {RESTORE}")
    return shard


def _open_counts(file: Path, max_neighbors: int, num_atoms: np.ndarray) -> np.ndarray:
    column = _open_table(file, EDGE_COUNTS_SCHEMA).column(0)
    counts = column.fill_null(0).to_numpy()
    # Every atom has max_neighbors edges at least, and every edge its reverse. Divided, so nothing overflows.
    sound = (
        len(counts) == len(num_atoms)
        and 1 <= max_neighbors < 2**31
        and (((counts // max_neighbors >= num_atoms) & (counts % 2 == 0)) | (counts == 0))
    )
    if not np.all(sound):
        raise DatasetError(f"{file} does not hold the edges of these crystals; {RESTORE}")
    return counts
