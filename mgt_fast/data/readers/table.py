"""csv files with a `cif` column: one crystal a row, every other column a possible target."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator

from .base import ID_KEYS, Faulty, PrepareError, RawRecord, Source, UnknownLayoutError
from .cif import CifText

STRUCTURE_COLUMN = "cif"
MAX_FIELD = 2**31 - 1


def read(source: Source) -> Iterator[RawRecord]:
    """Yield the rows; lines that begin with # before the header are skipped."""
    csv.field_size_limit(MAX_FIELD)
    with source.open_text() as lines:
        reader = csv.reader(itertools.dropwhile(lambda line: line.startswith("#"), lines))
        try:
            header = next(reader, [])
            if STRUCTURE_COLUMN not in header:
                raise UnknownLayoutError(
                    f"{source.name} has no column {STRUCTURE_COLUMN!r}; its columns are {', '.join(header)}"
                )
            id_column = next((key for key in ID_KEYS if key in header), None)
            for number, row in enumerate(reader, 1):
                where = f"{source.name}: row {number}"
                fields = dict(zip(header, row, strict=False))
                name = fields.get(id_column) or f"{source.stem}-{number}"
                if len(row) != len(header):
                    fault = Faulty(len(row), f"the row has {len(row)} fields, the header {len(header)}")
                    yield RawRecord(where, name, fault)
                    continue
                text = fields.pop(STRUCTURE_COLUMN)
                # A column without a name is the index that pandas writes.
                targets = {key: value for key, value in fields.items() if key and key != id_column}
                yield RawRecord(where, name, CifText(text), targets)
        except csv.Error as error:
            raise PrepareError(f"{source.name}, line {reader.line_num}: {error}") from error
