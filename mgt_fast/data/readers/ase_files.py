"""POSCAR files, extended xyz files and ASE databases, read through ASE."""

from __future__ import annotations

import io
import itertools
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from .base import (
    ID_KEYS,
    MAX_ATOMS,
    MAX_TEXT,
    Arrays,
    Crystal,
    Faulty,
    PrepareError,
    RawRecord,
    RecordError,
    Source,
    atomic_number,
    check_atoms,
    check_text,
)

_COUNT = re.compile("[0-9]{1,12}")
MAX_COLUMNS = 1000  # of an extended xyz file
STRUCTURE_KEYS = ("Lattice", "Properties", "pbc")  # of an extended xyz comment line


@dataclass(frozen=True)
class AseText:
    """The text of one structure in a format that ASE reads: "vasp" or "extxyz"."""

    text: str
    format: str

    def crystal(self) -> Crystal:
        """Parse the text."""
        import ase.io

        check_text(self.text)
        if self.format == "vasp":
            _check_poscar(self.text)
        try:
            atoms = ase.io.read(io.StringIO(self.text), format=self.format)
        except MemoryError:
            raise
        except Exception as error:  # ASE's parsers raise whatever the text makes them raise
            if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
                atomic_number(error.args[0])  # ASE looks symbols up in a dict
            message = f"{type(error).__name__}: {error}"
            raise RecordError("unreadable_record", self.text[:80], message) from error
        return _arrays(atoms).crystal()


def _check_poscar(text: str) -> None:
    """Refuse numbers of atoms for which ASE would take memory before it looks for the atoms."""
    for line in text.split("\n", 7)[5:7]:
        counts = []
        for word in itertools.takewhile(lambda word: "!" not in word, line.split()):
            try:
                counts.append(int(word))
            except ValueError:
                break
        check_atoms(sum(count for count in counts if count > 0))


def _columns(properties: object) -> int:
    """Return how many columns `Properties` tells of, as far as they can be counted."""
    try:
        return sum(max(int(count), 0) for count in properties.split(":")[2::3])
    except (AttributeError, ValueError):  # ASE says what is wrong with them
        return 0


def _arrays(atoms) -> Arrays:
    """Return the payload of an ASE Atoms."""
    return Arrays(atoms.numbers, atoms.positions, atoms.cell.array, cartesian=True, pbc=tuple(atoms.pbc))


def read_poscar(source: Source) -> Iterator[RawRecord]:
    """Yield the structure of a POSCAR file."""
    yield RawRecord(source.name, source.stem, AseText(source.read_text(MAX_TEXT + 1), "vasp"), source.targets)


def read_extxyz(source: Source) -> Iterator[RawRecord]:
    """Yield the frames of an extended xyz file; the scalars of their comment lines are possible targets."""
    from ase.io.extxyz import key_val_str_to_dict

    with source.open_text() as lines:
        for number in itertools.count(1):
            count = next(lines, "")
            if not count.strip():
                rest = next((line for line in lines if line.strip()), None)
                if rest is None:
                    return
                count = rest
            where, name = f"{source.name}: frame {number}", f"{source.stem}-{number}"
            if not _COUNT.fullmatch(count.strip()):
                message = "expected the number of atoms; this frame and all after it cannot be read"
                yield RawRecord(where, name, Faulty(count.strip(), message))
                return
            if int(count) > MAX_ATOMS:
                message = f"the frame has {int(count)} atoms, the limit is {MAX_ATOMS}; leave it out"
                yield RawRecord(where, name, Faulty(int(count), message, "too_many_atoms"))
                next(itertools.islice(lines, int(count), None), None)  # go on behind it
                continue
            frame = list(itertools.islice(lines, int(count) + 1))
            if len(frame) <= int(count):
                message = f"the file ends after {len(frame)} lines of the frame's {int(count) + 1}"
                yield RawRecord(where, name, Faulty(len(frame), message))
                return
            try:
                values = key_val_str_to_dict(frame[0])
            except Exception as error:
                yield RawRecord(where, name, Faulty(frame[0].strip(), f"the comment line: {error}"))
                continue
            columns = _columns(values.get("Properties"))
            if columns > MAX_COLUMNS:
                message = f"the frame has {columns} columns, the limit is {MAX_COLUMNS}"
                yield RawRecord(where, name, Faulty(columns, message, "too_large"))
                continue
            values = {key: value for key, value in values.items() if key not in STRUCTURE_KEYS}
            id_key = next((key for key in ID_KEYS if key in values), None)
            name = str(values.pop(id_key)) if id_key else name
            yield RawRecord(where, name, AseText("".join([count, *frame]), "extxyz"), values)


def read_database(source: Source) -> Iterator[RawRecord]:
    """Yield the rows of an ASE database; key-value pairs and the energy are possible targets."""
    import ase.db

    if source.path is None:
        raise PrepareError(
            f"{source.name}: an ASE database is not read from inside an archive; unpack it first"
        )
    with ase.db.connect(source.path, type="db") as database:
        try:
            _check_database(source.path)
            row_ids = [row.id for row in database.select(columns=["id"], include_data=False)]
        except sqlite3.DatabaseError as error:
            raise PrepareError(f"{source.name} is a damaged database: {error}") from error
        for row_id in row_ids:
            where, name = f"{source.name}: row {row_id}", f"{source.stem}-{row_id}"
            try:
                row = database.get(id=row_id)
                values = dict(row.key_value_pairs)
                if "energy" in row:
                    values["energy"] = row.energy
                payload = _arrays(row.toatoms())
            except Exception as error:  # a damaged row
                yield RawRecord(where, name, Faulty(row_id, f"{type(error).__name__}: {error}"))
                continue
            id_key = next((key for key in ID_KEYS if key in values), None)
            name = str(values.pop(id_key)) if id_key else name
            yield RawRecord(where, name, payload, values)


def _check_database(path: Path) -> None:
    """Refuse views and triggers: they are programs, which may run for ever."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        kinds = {kind for (kind,) in connection.execute("SELECT type FROM sqlite_master")}
    if not kinds <= {"table", "index"}:
        raise PrepareError(
            f"{path} holds a {min(kinds - {'table', 'index'})}, which an ASE database does not"
        )
