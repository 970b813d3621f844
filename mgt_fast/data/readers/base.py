"""What the readers of all formats share: a record as read, a crystal as parsed, and the ways to fail."""

from __future__ import annotations

import gzip
import io
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NoReturn, Protocol

import numpy as np

from ...elements import has_features

# Spheres 0.5 Å apart, packed as closely as can be, take 0.088 Å^3 each.
MIN_VOLUME_PER_ATOM = 0.1
MAX_FRACTIONAL = 2**20  # the neighbour list refuses atoms farther out
MAX_ATOMS = 100_000  # of a crystal
MAX_TEXT = 2**24  # characters of one structure; parsers take some sixty bytes for each
# What unpacks to more than this, and to so many times its size, is made to fill the memory.
MAX_UNPACKED, MAX_RATIO = 2**26, 200
ID_KEYS = ("material_id", "jid", "structure_id", "mp_id", "id", "name")


class PrepareError(ValueError):
    """An input that cannot be read as a whole, or wrong arguments; the message names it and the remedy."""


class UnknownLayoutError(PrepareError):
    """A file of a known kind that does not hold crystals in any known way."""


class DamagedError(PrepareError):
    """A file or an archive that cannot be unpacked."""


class RecordError(Exception):
    """One record that cannot be stored.

    Attributes:
        reason: reason code, as `rejects.csv` lists it.
        value: the value at fault.
        message: what is wrong with it and where.
    """

    def __init__(self, reason: str, value: object, message: str):
        if isinstance(value, list | dict):  # which may be long, and nested too deeply to be pickled or shown
            value = reprlib.repr(value)
        super().__init__(reason, value, message)  # all three, so that it survives pickling
        self.reason, self.value, self.message = reason, value, message


@dataclass(frozen=True)
class Crystal:
    """One crystal: atomic numbers (n,), fractional coordinates (n, 3), cell rows (3, 3) in Å, pbc (3,)."""

    numbers: np.ndarray
    frac_coords: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray


class Payload(Protocol):
    """A record's structure as the file holds it; it is parsed in a worker process."""

    def crystal(self) -> Crystal:
        """Parse and check the structure, or raise RecordError."""


@dataclass(frozen=True)
class RawRecord:
    """One record of an input.

    Attributes:
        source: the file (and the row in it) the record comes from.
        id: name of the crystal.
        payload: its structure, not parsed yet.
        targets: every other value of the record, as the file holds it.
        split: "train", "val", "test" or "".
    """

    source: str
    id: str
    payload: Payload
    targets: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""


@dataclass(frozen=True)
class Faulty:
    """The payload of a record whose reader has already found it unreadable."""

    value: object
    message: str
    reason: str = "unreadable_record"

    def crystal(self) -> NoReturn:
        """Raise what the reader found."""
        raise RecordError(self.reason, self.value, self.message)


@dataclass(frozen=True)
class Arrays:
    """A structure given by plain numbers, still unchecked.

    Attributes:
        species: n atomic numbers or chemical symbols.
        coords: n coordinates, fractional, or in Å if `cartesian`.
        cell: lattice vectors as rows, Å.
        cartesian: how `coords` are meant.
        pbc: periodicity along the three lattice vectors.
    """

    species: Any
    coords: Any
    cell: Any
    cartesian: bool
    pbc: Any = (True, True, True)

    def crystal(self) -> Crystal:
        """Check the structure and return it with fractional coordinates."""
        check_atoms(len(_sequence(self.species, "species")))
        numbers = np.array([atomic_number(s) for s in self.species], dtype=np.int64)
        coords = _floats(self.coords, (len(numbers), 3), "coordinates")
        cell = _floats(self.cell, (3, 3), "cell")
        pbc = np.broadcast_to(np.asarray(self.pbc, dtype=bool), 3)
        if not len(numbers):
            raise RecordError("unreadable_record", 0, "the structure has no atom")
        with np.errstate(over="ignore", invalid="ignore"):
            volume = abs(np.linalg.det(cell))
        if not np.isfinite(volume):
            raise RecordError("bad_cell", cell.tolist(), f"the volume of the cell {cell.tolist()} overflows")
        if volume < MIN_VOLUME_PER_ATOM * len(numbers):
            raise RecordError(
                "near_zero_volume",
                f"{volume:.6g}",
                f"the cell {cell.tolist()} has {volume:.6g} Å^3 for {len(numbers)} atoms, "
                f"less than {MIN_VOLUME_PER_ATOM} Å^3 an atom",
            )
        if self.cartesian:
            with np.errstate(over="ignore", invalid="ignore"):
                coords = coords @ np.linalg.inv(cell)
        far = np.argwhere(~(np.abs(coords) <= MAX_FRACTIONAL))
        if len(far):
            row, column = far[0]
            raise RecordError(
                "bad_coordinates",
                f"{coords[row, column]:.6g}",
                f"atom {row} is {coords[row, column]:.6g} lattice vectors {'abc'[column]} from the origin; "
                "wrap it into the cell (are these Cartesian coordinates?)",
            )
        return Crystal(numbers, coords, cell, pbc)


def check_atoms(count: int) -> None:
    """Raise RecordError if these are more atoms than a crystal may have."""
    if count > MAX_ATOMS:
        message = f"the crystal has {count} atoms or more, the limit is {MAX_ATOMS}; leave it out"
        raise RecordError("too_many_atoms", count, message)


def check_text(text: str) -> None:
    """Raise RecordError if a structure's text is longer than a parser should be given."""
    if len(text) > MAX_TEXT:
        message = f"the structure's text has more than {MAX_TEXT} characters; remove what is no structure"
        raise RecordError("too_large", len(text), message)


def atomic_number(species: object) -> int:
    """Return the atomic number of a chemical symbol or number, or raise RecordError."""
    if isinstance(species, str):
        number = _symbols().get(species.strip())
    else:
        number = (
            int(species) if isinstance(species, int | float | np.number) and species == species // 1 else None
        )
    if number is None or not 0 < number < len(has_features()):
        raise RecordError("unknown_element", species, f"{species!r} is no chemical element")
    if not has_features()[number]:
        raise RecordError("unknown_element", species, f"element {species!r} has no published atom features")
    return number


MISSING = frozenset({"", "na", "n/a", "nan", "none", "null", "-", "?"})


def target_value(raw: object) -> float | None:
    """Return a target as a number: NaN if it is missing ("na", "", null, NaN), None if it is no number."""
    if raw is None:
        return math.nan
    if isinstance(raw, str):
        text = raw.strip()
        try:
            return math.nan if text.lower() in MISSING else float(text)
        except ValueError:
            return None
    if not isinstance(raw, int | float | np.integer | np.floating) or isinstance(raw, bool):
        return None
    try:
        return float(raw)
    except OverflowError:  # an int of more than 308 digits
        return math.inf if raw > 0 else -math.inf


@cache
def _symbols() -> dict[str, int]:
    from ase.data import chemical_symbols

    table = {symbol: number for number, symbol in enumerate(chemical_symbols) if number}
    return table | {"D": 1, "T": 1}


def _sequence(value: object, what: str):
    if not isinstance(value, list | tuple | np.ndarray):
        raise RecordError("unreadable_record", value, f"{what}: expected a list, found {value!r:.100}")
    return value


def _floats(value: object, shape: tuple[int, ...], what: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RecordError("unreadable_record", value, f"{what}: expected numbers ({error})") from error
    if array.shape != shape:
        raise RecordError(
            "unreadable_record", array.shape, f"{what}: expected {shape} numbers, found {array.shape}"
        )
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        row, column = bad[0]
        raise RecordError(
            "not_finite", array[row, column], f"{what}: row {row}, column {column} is {array[row, column]}"
        )
    return array


@dataclass(frozen=True)
class Source:
    """A file to read records from: on disk or inside an archive.

    Attributes:
        name: how messages and `rejects.csv` call it.
        stem: name of the file without folder and endings: prefix of the ids that it does not give itself.
        opener: opens its bytes as they are stored.
        path: the file itself, None inside an archive.
        targets: values that a label file gives for it (`id_prop.csv`).
    """

    name: str
    stem: str
    opener: Callable[[], BinaryIO]
    path: Any = None
    targets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def filename(self) -> str:
        """Name of the file without folder, in lower case, without .gz."""
        return PurePosixPath(self.name.replace("\\", "/")).name.lower().removesuffix(".gz")

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file; gzip is undone."""
        with self.opener() as stream:
            head = stream.read(2)
            stream.seek(0)
            if head == b"\x1f\x8b":
                with io.BufferedReader(_Unpacked(stream), _PIECE) as unpacked:
                    yield unpacked
            else:
                yield stream

    @contextmanager
    def open_text(self) -> Iterator[io.TextIOWrapper]:
        """Open the file as text; bytes that are not UTF-8 stay visible as escapes."""
        with self.open() as stream:
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="backslashreplace", newline="")

    def read_text(self, limit: int = -1) -> str:
        """Return the file, or so many characters of it, as text."""
        with self.open_text() as lines:
            return lines.read(limit)


_PIECE = 2**16


class _Unpacked(io.RawIOBase):
    """A gzip file undone; one that unpacks to very much raises DamagedError."""

    def __init__(self, packed: BinaryIO):
        self._limit = unpacked_limit(packed.seek(0, io.SEEK_END))
        packed.seek(0)
        self._file = gzip.GzipFile(fileobj=packed)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self._file.readinto(memoryview(buffer)[:_PIECE])  # so that the limit is seen in time
        if self._file.tell() > self._limit:
            raise DamagedError(f"it unpacks to more than {self._limit} bytes; if that is meant, unpack it")
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            offset = self._file.seek(0, whence) + offset
        if offset < self._file.tell():
            return self._file.seek(offset)
        while (missing := offset - self._file.tell()) > 0 and self.readinto(bytearray(min(missing, _PIECE))):
            pass
        return self._file.tell()


def unpacked_limit(packed: int) -> int:
    """Return how many bytes so many packed ones may become."""
    return max(MAX_UNPACKED, MAX_RATIO * packed)
