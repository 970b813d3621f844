"""CIF files, parsed with gemmi; atoms are multiplied by the symmetry operations that the file lists."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .base import (
    MAX_TEXT,
    Arrays,
    Crystal,
    RawRecord,
    RecordError,
    Source,
    check_atoms,
    check_text,
)

CELL_TAGS = [
    f"_cell_{t}" for t in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
]
OPERATION_TAGS = (
    "_symmetry_equiv_pos_as_xyz",
    "_space_group_symop_operation_xyz",
    "_space_group_symop.operation_xyz",
)
GROUP_NAME_TAGS = ("_symmetry_space_group_name_H-M", "_space_group_name_H-M_alt")
GROUP_NUMBER_TAGS = ("_symmetry_Int_Tables_number", "_space_group_IT_number")
SAME_SITE = 0.1  # Å; images of an atom on a special position differ by rounding alone
OCCUPANCY_TOLERANCE = 1e-3

MAX_OPERATIONS = 1000  # a group has 192 at most; files with several settings list more
MAX_PAIRS = 4 * 10**7  # of images of one atom that are compared, over all atoms; seconds

_BLOCK = re.compile(r"data_(\S*)", re.IGNORECASE)
_UNCERTAINTY = re.compile(r"\(\d+\)$")
_TYPE_SYMBOL = re.compile(r"([A-Za-z]{1,2})(\d*[+-]?|[+-]\d*)$")


def read(source: Source) -> Iterator[RawRecord]:
    """Yield the structures of a CIF file: one, or one for each data block with atoms or a cell."""
    with source.open_text() as lines:
        blocks = _blocks(lines)
        first, second = next(blocks), next(blocks, None)
        if second is None:
            yield RawRecord(source.name, source.stem, CifText(first[1]), source.targets)
            return
        for name, text in itertools.chain([first, second], blocks):
            if "_atom_site_" in text or "_cell_length_a" in text:
                label = f"{source.stem}/{name}"
                yield RawRecord(f"{source.name}: data_{name}", label, CifText(text), source.targets)


def _blocks(stream: io.TextIOBase) -> Iterator[tuple[str, str]]:
    """Split a CIF into its data blocks, at least one; text fields between semicolons may hold anything.

    Of a block that is longer than `MAX_TEXT` just a little more than that is kept.
    """
    name, pieces, length, in_text, begins = None, [], 0, False, True
    while piece := stream.readline(MAX_TEXT):  # a line, or a piece of one
        if begins and piece.startswith(";"):
            in_text = not in_text
        start = _BLOCK.match(piece) if begins and not in_text else None
        if start:
            if name is not None:
                yield name, "".join(pieces)
                pieces, length = [], 0
            name = start[1]
        if length <= MAX_TEXT:
            pieces.append(piece)
            length += len(piece)
        begins = piece.endswith(("\n", "\r"))
    yield name or "", "".join(pieces)


@dataclass(frozen=True)
class CifText:
    """The text of a CIF file with one data block."""

    text: str

    def crystal(self) -> Crystal:
        """Parse the text."""
        from gemmi import UnitCell, cif

        check_text(self.text)
        try:
            document = cif.read_string(self.text)
        except (ValueError, RuntimeError) as error:
            raise _unreadable(self.text[:80], str(error)) from error
        if len(document) != 1:
            raise _unreadable(self.text[:80], f"expected one data block, found {len(document)}")
        block = document[0]

        lengths_angles = [_number(block.find_value(tag), tag) for tag in CELL_TAGS]
        cell = np.array(UnitCell(*lengths_angles).orth.mat.tolist()).T
        if not np.isfinite(cell).all():
            raise RecordError("near_zero_volume", lengths_angles, f"no cell has the sides {lengths_angles}")
        check_atoms(len(block.find_values("_atom_site_fract_x")))
        coords = [_column(block, f"_atom_site_fract_{axis}") for axis in "xyz"]
        if not coords[0] or len({len(column) for column in coords}) != 1:
            raise _unreadable("_atom_site_fract_x", "the atoms have no fractional coordinates")
        coords = np.array(
            [
                [_number(text, f"_atom_site_fract_{axis} of atom {i}") for i, text in enumerate(column)]
                for axis, column in zip("xyz", coords, strict=True)
            ]
        ).T
        for tag in ("_atom_site_type_symbol", "_atom_site_label", "_atom_site_occupancy"):
            count = len(block.find_values(tag))
            if count not in (0, len(coords)):
                raise _unreadable(count, f"{tag} has {count} values for {len(coords)} atoms")
        species = _species(block)
        _check_occupancy(block, species)
        rotations, translations = _operations(block, lengths_angles)
        if len(rotations) > 1:
            site, coords = _all_images(coords, cell, rotations, translations)
            species = [species[i] for i in site]
        return Arrays(species, coords, cell, cartesian=False).crystal()


def _unreadable(value: object, message: str) -> RecordError:
    return RecordError("unreadable_cif", value, message)


def _column(block, tag: str) -> list[str]:
    return list(block.find_values(tag))


def _number(text: str | None, tag: str) -> float:
    if text in (None, "?", "."):
        raise _unreadable(text, f"{tag} is missing")
    try:
        value = float(_UNCERTAINTY.sub("", text) if text.endswith(")") else text)
    except ValueError:
        raise _unreadable(text, f"{tag} is {text!r}, not a number") from None
    if not math.isfinite(value):
        raise RecordError("not_finite", text, f"{tag} is {text}")
    return value


def _species(block) -> list[str]:
    """Return the chemical symbol of each listed atom: its type, or else the letters its label begins with."""
    from gemmi.cif import as_string

    types = [as_string(text) for text in _column(block, "_atom_site_type_symbol")]
    if types:
        matches = [_TYPE_SYMBOL.match(text) for text in types]
        return [match[1].capitalize() if match else text for text, match in zip(types, matches, strict=True)]
    labels = [as_string(text) for text in _column(block, "_atom_site_label")]
    if not labels:
        raise _unreadable("_atom_site_type_symbol", "the atoms have neither type symbols nor labels")
    return [re.match("[A-Za-z]*", text)[0].capitalize() or text for text in labels]


def _check_occupancy(block, species: list[str]) -> None:
    for i, text in enumerate(_column(block, "_atom_site_occupancy")):
        if text in ("?", "."):
            continue
        occupancy = _number(text, f"_atom_site_occupancy of atom {i}")
        if abs(occupancy - 1) > OCCUPANCY_TOLERANCE:
            raise RecordError(
                "partial_occupancy",
                text,
                f"atom {i} ({species[i]}) has occupancy {text}; order the structure first",
            )


def _operations(block, lengths_angles: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rotations (P, 3, 3) and translations (P, 3) that make the cell from the listed atoms."""
    import gemmi

    listed = [block.find_values(tag) for tag in OPERATION_TAGS]
    count = sum(len(column) for column in listed)
    if count > MAX_OPERATIONS:
        raise _unreadable(count, f"{count} symmetry operations are listed, the limit is {MAX_OPERATIONS}")
    triplets = [gemmi.cif.as_string(text) for column in listed for text in column]
    if triplets:
        try:
            operations = [gemmi.Op(triplet) for triplet in triplets]
        except RuntimeError as error:
            raise _unreadable(triplets, f"the symmetry operations are unreadable: {error}") from error
    else:
        operations = list(_space_group(block, lengths_angles).operations())
    rotations = np.array([operation.rot for operation in operations]) / gemmi.Op.DEN
    return rotations, np.array([operation.tran for operation in operations]) / gemmi.Op.DEN


def _space_group(block, lengths_angles: list[float]):
    """Return the space group that a file without symmetry operations names; P 1 if it names none."""
    import gemmi

    names = [gemmi.cif.as_string(text) for tag in GROUP_NAME_TAGS for text in _column(block, tag)]
    numbers = [text for tag in GROUP_NUMBER_TAGS for text in _column(block, tag)]
    given = [text for text in names + numbers if text not in ("", "?", ".")]
    if not given:
        return gemmi.SpaceGroup("P 1")
    name = given[0]
    if name.isdecimal() and gemmi.find_spacegroup_by_number(int(name)):
        name = gemmi.find_spacegroup_by_number(int(name)).hm
    group = gemmi.find_spacegroup_by_name(name, *lengths_angles[3:6:2])
    if group is None:
        raise _unreadable(given[0], f"space group {name!r} is unknown and no symmetry operations are listed")
    if group.ext in ("1", "2") and not name.endswith(f":{group.ext}"):
        raise _unreadable(given[0], f"space group {name!r} has two origins; list the symmetry operations")
    if not gemmi.UnitCell(*lengths_angles).is_compatible_with_spacegroup(group):
        raise _unreadable(given[0], f"a cell with the sides and angles {lengths_angles} cannot have {name!r}")
    return group


def _all_images(coords, cell, rotations, translations) -> tuple[np.ndarray, np.ndarray]:
    """Return, for all atoms of the cell, the listed atom each is an image of, and the coordinates (n, 3)."""
    if len(coords) * len(rotations) ** 2 > MAX_PAIRS:
        message = f"{len(rotations)} symmetry operations on {len(coords)} atoms; list all atoms instead"
        raise RecordError("too_many_atoms", len(coords) * len(rotations), message)
    sites, images = [], []
    for i, xyz in enumerate(coords):
        candidates = rotations @ xyz + translations
        difference = candidates[:, None] - candidates
        distance = np.linalg.norm((difference - difference.round()) @ cell, axis=-1)
        repeated = np.tril(distance < SAME_SITE, -1).any(axis=1)
        images.append(candidates[~repeated])
        sites.append(np.full(len(images[-1]), i))
    return np.concatenate(sites), np.concatenate(images)
