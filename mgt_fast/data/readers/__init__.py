"""Readers of the formats that `prepare` takes in, one module a family; each yields RawRecords."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from . import ase_files, cif, crystallm, json_lists, table, torch_files
from .base import PrepareError, RawRecord, Source

READERS: dict[str, Callable[[Source], Iterator[RawRecord]]] = {
    "cif": cif.read,
    "csv": table.read,
    "poscar": ase_files.read_poscar,
    "extxyz": ase_files.read_extxyz,
    "ase-db": ase_files.read_database,
    "json": json_lists.read,
    "jarvis": partial(json_lists.read, layout="jarvis"),
    "mp": partial(json_lists.read, layout="mp"),
    "matbench": partial(json_lists.read, layout="matbench"),
    "atoms": partial(json_lists.read, layout="atoms"),
    "crystallm": crystallm.read,
    "tensor-pickle": torch_files.read_tensor_pickle,
    "gmae": torch_files.read_gmae,
}
FORMATS = tuple(READERS)
STRUCTURE_FILES = ("cif", "poscar")  # formats whose files hold a structure and no targets
ENDINGS = {
    ".cif": "cif",
    ".csv": "csv",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".json": "json",
}


def check_format(name: str | None) -> None:
    """Raise PrepareError unless `name` is None or a format."""
    if name is not None and name not in READERS:
        raise PrepareError(f"format {name!r} is unknown; choose one of {', '.join(FORMATS)}")


def format_of_name(filename: str) -> str | None:
    """Return the format that a file's name (lower case, without .gz) tells, if it does."""
    for ending, format in ENDINGS.items():
        if filename.endswith(ending):
            return format
    return "poscar" if filename.startswith(("poscar", "contcar")) else None


def detect(source: Source) -> str | None:
    """Return the format of a file from its first bytes and its name, or None if it is none of ours."""
    with source.open() as stream:
        head = stream.read(4096)
    if head.startswith(b"SQLite format 3\0"):
        return "ase-db"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "crystallm"
    named = format_of_name(source.filename)
    if named:
        return named
    if head.lstrip()[:1] in (b"[", b"{"):
        return "json"
    return "cif" if b"_cell_length_a" in head else None
