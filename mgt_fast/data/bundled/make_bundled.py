"""Make the bundled dataset of 6,317 Materials Project crystals; README.md beside this file says from what.

`python make_bundled.py matminer-0.4.0.tar.gz megnet_e_form.json.zip` writes `dataset/` beside this script.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import math
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from pymatgen.core import Element
from pymatgen.io.vasp import Poscar

from mgt_fast.data.counts import count_edges
from mgt_fast.data.store import BUNDLED, SPLITS, DatasetWriter, Target, record_batch
from mgt_fast.graph import SHELL_TOLERANCE

MAX_NEIGHBORS = (12, 25)  # of the demo and of the shipped configurations
SDIST_SHA256 = "1a6bdfb198b36d836bab4fbcdffb2dc4fda8a740c3dc08cbb21ea43b817fec86"
# A crystal in several sets takes its structure from the first of them.
SETS = ("flla_2015", "elastic_tensor", "dielectric_constant", "piezoelectric_tensor")
TARGETS = {
    "formation_energy_per_atom": Target("eV/atom", "formation energy (flla_2015)"),
    "e_above_hull": Target("eV/atom", "energy above the convex hull (flla_2015)"),
    "band_gap": Target("eV", "band gap, PBE or PBE+U (dielectric_constant)"),
    "log10_K_VRH": Target("log10(GPa)", "bulk modulus, Voigt-Reuss-Hill average (elastic_tensor)"),
    "log10_G_VRH": Target("log10(GPa)", "shear modulus, Voigt-Reuss-Hill average (elastic_tensor)"),
}


def read_set(archive: tarfile.TarFile, name: str) -> list[dict[str, str]]:
    """Return the rows of a csv set; its first line is a comment, and rows may have an extra leading index."""
    file = archive.extractfile(f"matminer-0.4.0/matminer/datasets/{name}.csv")
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    text.readline()
    header, *rows = csv.reader(text)
    return [dict(zip(header, row[len(row) - len(header) :], strict=True)) for row in rows]


def read_structure(name: str, row: dict[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (numbers, frac_coords, cell) of a row."""
    if name == "flla_2015":
        structure = ast.literal_eval(row["structure"])
        sites = structure["sites"]
        if any(len(site["species"]) != 1 or site["species"][0]["occu"] != 1 for site in sites):
            raise ValueError(f"{row['material_id']}: partial occupancy")
        numbers = [Element(site["species"][0]["element"]).Z for site in sites]
        return (
            np.array(numbers),
            np.array([s["abc"] for s in sites]),
            np.array(structure["lattice"]["matrix"]),
        )
    structure = Poscar.from_str(row["poscar"]).structure
    return np.array(structure.atomic_numbers), structure.frac_coords, structure.lattice.matrix


def read_targets(name: str, row: dict[str, str]) -> dict[str, float]:
    """Return the targets that a row carries."""
    match name:
        case "flla_2015":
            return {key: float(row[key]) for key in ("formation_energy_per_atom", "e_above_hull")}
        case "elastic_tensor":
            return {f"log10_{key}": math.log10(float(row[key])) for key in ("K_VRH", "G_VRH")}
        case "dielectric_constant":
            return {"band_gap": float(row["band_gap"])}
    return {}


def main(sdist: str, split_zip: str) -> None:
    """Write the bundled dataset from the matminer source distribution and the MEGNet split file."""
    content = Path(sdist).read_bytes()
    if hashlib.sha256(content).hexdigest() != SDIST_SHA256:
        raise ValueError(f"{sdist} is not the source distribution of matminer 0.4.0: its SHA-256 differs")
    structures, targets = {}, {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in SETS:
            for row in read_set(archive, name):
                material_id = row["material_id"]
                if material_id not in structures:
                    structures[material_id] = read_structure(name, row)
                targets.setdefault(material_id, {}).update(read_targets(name, row))
    with zipfile.ZipFile(split_zip) as archive:
        parts = json.loads(archive.read("megnet_e_form.json"))
    split = {material_id: part for part in SPLITS if part for material_id in parts[part]}

    ids = sorted(structures, key=lambda material_id: int(material_id.removeprefix("mp-")))
    numbers, frac_coords, cell = zip(*(structures[i] for i in ids), strict=True)
    batch = record_batch(
        ids,
        numbers,
        frac_coords,
        np.stack(cell),
        np.ones((len(ids), 3), dtype=bool),
        [split.get(i, "") for i in ids],
        {name: [targets[i].get(name, math.nan) for i in ids] for name in TARGETS},
    )
    with DatasetWriter(BUNDLED, TARGETS, overwrite=True) as writer:
        writer.write(batch)
        crystals = writer.written()
        for max_neighbors in MAX_NEIGHBORS:
            counts = count_edges(crystals, max_neighbors)
            writer.add_edge_counts(counts, max_neighbors, SHELL_TOLERANCE)


if __name__ == "__main__":
    main(*sys.argv[1:])
