"""JSON files: JARVIS and MEGNet, Materials Project 2018.6.1, matbench, and plain lists of atoms."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .base import (
    ID_KEYS,
    Arrays,
    Crystal,
    Faulty,
    PrepareError,
    RawRecord,
    RecordError,
    Source,
    UnknownLayoutError,
)
from .cif import OCCUPANCY_TOLERANCE, CifText


def _jarvis(item: dict) -> Arrays:
    atoms = item["atoms"]
    if not isinstance(atoms["cartesian"], bool):
        raise RecordError("unreadable_record", atoms["cartesian"], "'cartesian' is neither true nor false")
    return Arrays(atoms["elements"], atoms["coords"], atoms["lattice_mat"], atoms["cartesian"])


def _materials_project(item: dict) -> CifText:
    if not isinstance(item["structure"], str):
        raise RecordError("unreadable_cif", item["structure"], "'structure' is not the text of a CIF")
    return CifText(item["structure"])


def _matbench(item: dict) -> Arrays:
    """Read a pymatgen Structure as its `as_dict` writes it."""
    sites, lattice = item["structure"]["sites"], item["structure"]["lattice"]
    for i, site in enumerate(sites):
        species = site["species"]
        if len(species) != 1 or abs(species[0]["occu"] - 1) > OCCUPANCY_TOLERANCE:
            given = ", ".join(f"{s['element']} {s['occu']}" for s in species)
            message = f"site {i} holds {given}; order the structure first"
            raise RecordError("partial_occupancy", given, message)
    symbols = [site["species"][0]["element"] for site in sites]
    coords = [site["abc"] for site in sites]
    pbc = lattice.get("pbc", (True, True, True))
    return Arrays(symbols, coords, lattice["matrix"], cartesian=False, pbc=pbc)


def _atoms(item: dict) -> Arrays:
    pbc = item.get("pbc", (True, True, True))
    return Arrays(item["atomic_numbers"], item["positions"], item["cell"], cartesian=True, pbc=pbc)


# Layout of a list: the keys of an item that hold its structure, and how to read them.
LAYOUTS: dict[str, tuple[set[str], Callable[[dict], Arrays | CifText]]] = {
    "jarvis": ({"atoms"}, _jarvis),
    "mp": ({"structure"}, _materials_project),
    "atoms": ({"positions", "cell", "atomic_numbers"}, _atoms),
    "matbench": ({"structure"}, _matbench),
}


@dataclass(frozen=True)
class JsonItem:
    """The keys of an item that hold its structure."""

    item: dict
    layout: str

    def crystal(self) -> Crystal:
        """Read the item."""
        return LAYOUTS[self.layout][1](self.item).crystal()


def read(source: Source, layout: str | None = None) -> Iterator[RawRecord]:
    """Yield the records of a JSON file; its layout is found from its keys unless it is given."""
    with source.open() as stream:
        try:
            content = json.load(stream)
        except (ValueError, RecursionError) as error:  # among them numbers of more than 4,300 digits
            raise PrepareError(f"{source.name} is no valid JSON: {error}") from error
    layout = layout or _find_layout(source, content)
    if layout == "matbench":
        yield from _read_matbench(source, content)
        return
    if not isinstance(content, list):
        raise PrepareError(f"{source.name}: format {layout!r} is a JSON list, found {type(content).__name__}")
    yield from read_items(source, content, layout)


def read_items(source: Source, content: list, layout: str) -> Iterator[RawRecord]:
    """Yield the items of a list as records."""
    keys, _ = LAYOUTS[layout]
    for number, item in enumerate(content, 1):
        where, name = f"{source.name}: item {number}", f"{source.stem}-{number}"
        if not isinstance(item, dict) or not keys <= item.keys():
            message = f"expected the keys {', '.join(sorted(keys))}"
            yield RawRecord(where, name, Faulty(reprlib.repr(item), message))
            continue
        id_key = next((key for key in ID_KEYS if key in item), None)
        name = str(item[id_key]) if id_key else name
        structure_keys = {*keys, "pbc"}
        structure = {key: value for key, value in item.items() if key in structure_keys}
        targets = {
            key: _scalar(value) for key, value in item.items() if key != id_key and key not in structure_keys
        }
        yield RawRecord(where, name, JsonItem(structure, layout), targets)


def _find_layout(source: Source, content: object) -> str:
    if isinstance(content, dict) and {"index", "columns", "data"} <= content.keys():
        return "matbench"
    first = (
        next((item for item in content if isinstance(item, dict)), {}) if isinstance(content, list) else {}
    )
    for layout, (keys, _) in LAYOUTS.items():
        if keys <= first.keys():
            return layout
    found = f"a list whose items have the keys {sorted(first)}" if first else f"a {type(content).__name__}"
    raise UnknownLayoutError(
        f"{source.name} is {found:.300}; expected JARVIS or MEGNet items (key 'atoms'), Materials Project "
        "items ('structure'), matbench ('index', 'columns', 'data') or atoms ('positions', 'cell', "
        "'atomic_numbers')"
    )


def _read_matbench(source: Source, content: object) -> Iterator[RawRecord]:
    try:
        columns = content["columns"]
        rows = list(zip(content["index"], content["data"], strict=True))
        structure_column = columns.index("structure")
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise PrepareError(
            f"{source.name}: expected index, columns (one of them 'structure') and data ({error})"
        ) from error
    digits = len(str(len(rows)))
    for number, (index, row) in enumerate(rows, 1):
        where, name = f"{source.name}: row {number}", f"{source.stem}-{index}"
        if source.stem.startswith("matbench_"):  # the ids that matbench's own folds use
            name = f"mb-{source.stem.removeprefix('matbench_')}-{number:0{digits}d}"
        if not isinstance(row, list) or len(row) != len(columns):
            yield RawRecord(where, name, Faulty(reprlib.repr(row), f"expected {len(columns)} values"))
            continue
        targets = {key: value for key, value in zip(columns, row, strict=True) if key != "structure"}
        yield RawRecord(where, name, JsonItem({"structure": row[structure_column]}, "matbench"), targets)


def _scalar(value: object) -> object:
    """Return the only element of a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
