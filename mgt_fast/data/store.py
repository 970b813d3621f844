"""The dataset format: Arrow IPC shards that map into memory, and a manifest that guards them.

A dataset is a folder with `manifest.json` and shards `shard-00000.arrow`, ... Each shard is an uncompressed
Arrow IPC file of one record batch, so that every column is one contiguous buffer; pandas and polars read it.

    column       Arrow type                  meaning
    id           string                      unique name of the crystal
    numbers      list<uint8>                 atomic numbers
    frac_coords  list<double>                fractional coordinates, three an atom, inside the cell or not
    cell         fixed_size_list<double>[9]  lattice vectors as rows, Å
    pbc          uint8                       bit i: periodic along lattice vector i
    split        dictionary<string>          "train", "val", "test" or "" (in none of them)
    <target>     double, nullable            one column a target; null where it is not known
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..structures import CrystalBatch

FORMAT = "mgt-fast dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
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


class DatasetError(ValueError):
    """A dataset that cannot be read or written; the message names the file and the remedy."""


@dataclass(frozen=True)
class Target:
    """What a target column holds."""

    unit: str = ""
    description: str = ""


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

    def _flush(self) -> None:
        batch = pa.concat_batches(self._pending)
        name = f"shard-{len(self._shards):05d}.arrow"
        with pa.OSFile(str(self.folder / name), "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
            writer.write_batch(batch)
        self._shards.append(
            {
                "file": name,
                "sha256": _sha256(self.folder / name),
                "crystals": self._pending_rows,
                "atoms": self._pending_atoms,
            }
        )
        self._pending, self._pending_rows, self._pending_atoms = [], 0, 0

    def _finish(self) -> None:
        if self._pending:
            self._flush()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "targets": {name: vars(target) for name, target in self.targets.items()},
            "crystals": sum(shard["crystals"] for shard in self._shards),
            "atoms": sum(shard["atoms"] for shard in self._shards),
            "shards": self._shards,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self.folder / MANIFEST).write_text(text, encoding="utf-8")
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
        num_atoms: atoms of each crystal, (n,) int64.
        targets: target name to values, (n,) float64, NaN where missing.
        target_info: target name to its unit and description.
        split: "train", "val", "test" or "" of each crystal, (n,) str.
    """

    def __init__(self, path: Path, shards: list[pa.RecordBatch], target_info: dict[str, Target]):
        self.path = path
        self.target_info = target_info
        self.ids = _Ids([shard.column("id") for shard in shards])
        self.split = _joined([shard.column("split").cast(pa.string()) for shard in shards], "U5")
        self.targets = {
            name: _joined([shard.column(name) for shard in shards], np.float64) for name in target_info
        }
        offsets = [shard.column("numbers").offsets.to_numpy() for shard in shards]
        self.num_atoms = np.concatenate([np.empty(0, np.int64), *(np.diff(o) for o in offsets)])
        self._first_atom = np.concatenate([np.empty(0, np.int64), *(o[:-1] for o in offsets)])
        self._columns = [
            (
                shard.column("numbers").values.to_numpy(),
                shard.column("frac_coords").values.to_numpy().reshape(-1, 3),
                shard.column("cell").values.to_numpy().reshape(-1, 3, 3),
                shard.column("pbc").to_numpy(),
            )
            for shard in shards
        ]

    @classmethod
    def open(cls, path: str | os.PathLike | None = None, *, verify: bool = True) -> CrystalDataset:
        """Open a dataset folder, or with None the bundled set of Materials Project crystals.

        Args:
            path: the folder.
            verify: compare every shard's SHA-256 with the manifest (about a second for 2 GB).

        Raises:
            DatasetError: if the folder is no dataset of this version, or a shard is missing, damaged,
                truncated or not the one that was written; the message names the file.
        """
        path = BUNDLED if path is None else Path(path)
        manifest = _read_manifest(path)
        targets = {name: Target(**info) for name, info in manifest["targets"].items()}
        schema = dataset_schema(list(targets))
        return cls(path, [_open_shard(path, entry, schema, verify) for entry in manifest["shards"]], targets)

    def __len__(self) -> int:
        return len(self.num_atoms)

    @property
    def target_units(self) -> dict[str, str]:
        """Unit of each target."""
        return {name: target.unit for name, target in self.target_info.items()}

    def gather(self, indices) -> CrystalBatch:
        """Read the crystals at `indices`, in that order.

        Args:
            indices: positions in the dataset, (B,) integers from 0 to len - 1; they may repeat.

        Raises:
            IndexError: for a position outside the dataset.
            TypeError: if `indices` are not whole numbers.
        """
        indices = np.asarray(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.dtype.kind not in "iu":
            raise TypeError(
                f"indices are {indices.dtype}, expected whole numbers (for a mask: np.flatnonzero)"
            )
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"crystal {indices[outside][0]} of a dataset of {len(self)}")
        batch_ptr = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(self.num_atoms[indices], out=batch_ptr[1:])
        numbers = np.empty(batch_ptr[-1], dtype=np.int64)
        frac_coords = np.empty((batch_ptr[-1], 3))
        cell = np.empty((len(indices), 3, 3))
        pbc = np.empty(len(indices), dtype=np.uint8)

        shard = self.ids.shard_of(indices)
        for s in np.unique(shard):
            members = np.flatnonzero(shard == s)
            chosen = indices[members]
            row = chosen - self.ids.shard_ptr[s]
            num_atoms = self.num_atoms[chosen]
            source = _ranges(self._first_atom[chosen], num_atoms)
            goal = _ranges(batch_ptr[members], num_atoms)
            shard_numbers, shard_coords, shard_cell, shard_pbc = self._columns[s]
            numbers[goal] = shard_numbers[source]
            frac_coords[goal] = shard_coords[source]
            cell[members] = shard_cell[row]
            pbc[members] = shard_pbc[row]
        return CrystalBatch(
            numbers=torch.from_numpy(numbers),
            frac_coords=torch.from_numpy(frac_coords),
            cell=torch.from_numpy(cell),
            batch_ptr=torch.from_numpy(batch_ptr),
            pbc=torch.from_numpy((pbc[:, None] >> np.arange(3, dtype=np.uint8) & 1).astype(bool)),
            ids=self.ids.take(indices),
        )


class _Ids(Sequence):
    """The ids of all shards as one sequence of str, decoded when asked for."""

    def __init__(self, columns: list[pa.StringArray]):
        self._columns = columns
        self.shard_ptr = np.cumsum([0, *(len(column) for column in columns)])

    def shard_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the shard that holds each crystal."""
        return np.searchsorted(self.shard_ptr, indices, side="right") - 1

    def take(self, indices: np.ndarray) -> tuple[str, ...]:
        """Return the ids at `indices`."""
        shard = self.shard_of(indices)
        ids = np.empty(len(indices), dtype=object)
        for s in np.unique(shard):
            members = np.flatnonzero(shard == s)
            ids[members] = self._columns[s].take(pa.array(indices[members] - self.shard_ptr[s])).to_pylist()
        return tuple(ids)

    def __len__(self) -> int:
        return int(self.shard_ptr[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return list(self.take(np.arange(len(self))[index]))
        return self.take(np.array([range(len(self))[index]]))[0]

    def __iter__(self):
        for column in self._columns:
            yield from column.to_pylist()


def _joined(columns: list[pa.Array], dtype) -> np.ndarray:
    parts = [column.to_numpy(zero_copy_only=False) for column in columns]
    return np.concatenate([np.empty(0, dtype), *(part.astype(dtype) for part in parts)])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return [starts[0], starts[0] + 1, ..., starts[0] + lengths[0] - 1, starts[1], ...]."""
    ends = np.cumsum(lengths)
    total = ends[-1] if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict:
    file = path / MANIFEST
    if not file.is_file():
        raise DatasetError(f"{path} is no dataset: it has no {MANIFEST}; make one with `mgt-fast prepare`")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        recognised = manifest["format"] == FORMAT
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{file} is damaged ({error}); prepare the dataset again") from error
    if not recognised:
        raise DatasetError(f"{file} is not the manifest of an {FORMAT}")
    if manifest.get("version") != FORMAT_VERSION:
        raise DatasetError(
            f"{file} has format version {manifest.get('version')}, this program reads {FORMAT_VERSION}; "
            "prepare the dataset again"
        )
    try:
        for entry in manifest["shards"]:
            if Path(entry["file"]).name != entry["file"]:
                raise DatasetError(f"{file} names a shard outside its folder: {entry['file']!r}")
            _ = (entry["sha256"] + "", entry["crystals"] + 0, entry["atoms"] + 0)
        {name: Target(**info) for name, info in manifest["targets"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file} is damaged ({error!r}); prepare the dataset again") from error
    return manifest


def _open_shard(path: Path, entry: dict, schema: pa.Schema, verify: bool) -> pa.RecordBatch:
    file = path / entry["file"]
    remedy = "restore it from a copy or prepare the dataset again"
    if not file.is_file():
        raise DatasetError(f"shard {file} is missing; {remedy}")
    if verify and _sha256(file) != entry["sha256"]:
        raise DatasetError(f"shard {file} is damaged or another file: its SHA-256 differs; {remedy}")
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(file)))
        if reader.num_record_batches != 1 or not reader.schema.equals(schema):
            raise DatasetError(f"shard {file} does not have the manifest's columns; {remedy}")
        shard = reader.get_batch(0)
        num_atoms, num_coords = (shard.column(name).offsets.to_numpy() for name in ("numbers", "frac_coords"))
    except (pa.ArrowInvalid, OSError) as error:
        raise DatasetError(f"shard {file} cannot be read ({error}); {remedy}") from error
    expected = (entry["crystals"], entry["atoms"])
    found = (shard.num_rows, len(shard.column("numbers").values))
    if found != expected or not np.array_equal(3 * num_atoms.astype(np.int64), num_coords):
        raise DatasetError(
            f"shard {file} holds {found[0]} crystals with {found[1]} atoms, the manifest says "
            f"{expected[0]} with {expected[1]}; {remedy}"
        )
    return shard
