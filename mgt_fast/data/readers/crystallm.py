"""CrystaLLM pickles: a list of (id, CIF text), unpickled without any class or function."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import NoReturn

from .base import Faulty, PrepareError, RawRecord, Source
from .cif import CifText


class PlainUnpickler(pickle.Unpickler):
    """Builds strings, numbers, lists, tuples and dicts; refuses a pickle that names a class or function."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse."""
        raise pickle.UnpicklingError(f"it names {module}.{name}; only strings, lists and tuples are allowed")

    def persistent_load(self, pid: object) -> NoReturn:
        """Refuse."""
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read(source: Source) -> Iterator[RawRecord]:
    """Yield the pairs of the list."""
    with source.open() as stream:
        try:
            content = PlainUnpickler(stream).load()
        except Exception as error:  # the opcodes of a damaged pickle raise whatever they come upon
            raise PrepareError(
                f"pickle {source.name} is not read: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(content, list):
        raise PrepareError(f"pickle {source.name} holds a {type(content).__name__}, not a list of (id, CIF)")
    for number, item in enumerate(content, 1):
        where = f"{source.name}: item {number}"
        if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, str) for part in item):
            yield RawRecord(where, item[0], CifText(item[1]))
        else:
            fault = Faulty(repr(item)[:80], "expected a pair of strings, (id, CIF)")
            yield RawRecord(where, f"{source.stem}-{number}", fault)
