"""Numbers and classes that describe crystals, for studies that ask what a network's behaviour goes with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from pymatgen.core import Element, Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from ..data import CrystalDataset
from ..graph import CrystalGraph, build_graph
from ..structures import CrystalBatch

CRYSTALS_AT_A_TIME = 256
SYMMETRY_PRECISION = 0.01  # Å
_GRAMS_PER_AMU = 1.66053906892e-24
_CM3_PER_CUBIC_ANGSTROM = 1e-24

DESCRIPTORS = {
    "num_atoms": "atoms in the cell",
    "density": "density, g/cm³",
    "volume_per_atom": "volume per atom, Å³",
    "cell_ratio": "cell: longest / shortest vector",
    "cell_spread": "cell: spread of log lengths",
    "cell_metric_ratio": "cell: √(ratio of extreme metric eigenvalues)",
    "local_anisotropy": "neighbours: anisotropy of their second moment",
    "local_polarity": "neighbours: distance of their centre",
    "mean_atomic_number": "composition: mean Z",
    "mean_electronegativity": "composition: mean electronegativity",
    "electronegativity_spread": "composition: spread of electronegativity",
    "num_elements": "composition: number of elements",
    "metal_fraction": "composition: share of metals",
    "transition_metal_fraction": "composition: share of transition metals",
    "oxygen_fraction": "composition: share of oxygen",
}
"""Name of each descriptor to what it is, for people."""

CRYSTAL_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")


@dataclass(frozen=True)
class Symmetry:
    """A crystal's symmetry, or why it is not known.

    Attributes:
        system: one of `CRYSTAL_SYSTEMS`; None if it was not found.
        space_group: its number; None likewise.
        problem: what stood in the way; empty if nothing did.
    """

    system: str | None = None
    space_group: int | None = None
    problem: str = ""


def describe(dataset: CrystalDataset, indices: np.ndarray, max_neighbors: int) -> dict[str, np.ndarray]:
    """Compute `DESCRIPTORS` of some crystals of a dataset.

    Args:
        dataset: the crystals.
        indices: their positions, (n,).
        max_neighbors: of the graphs that say who neighbours whom.

    Returns:
        (n,) float64 by name; NaN where an element has no Pauling electronegativity.

    Raises:
        ValueError: as `graph.build_graph`.
    """
    parts = []
    for first in range(0, len(indices), CRYSTALS_AT_A_TIME):
        crystals = dataset.gather(indices[first : first + CRYSTALS_AT_A_TIME])
        graph = build_graph(crystals, max_neighbors)
        parts.append({**_size_and_composition(crystals), **_cell_shape(graph), **_environments(graph)})
    return {name: np.concatenate([part[name] for part in parts]) for name in DESCRIPTORS}


def symmetries(dataset: CrystalDataset, indices: np.ndarray) -> list[Symmetry]:
    """Find the symmetry of some crystals of a dataset with spglib, at `SYMMETRY_PRECISION`."""
    found = []
    for first in range(0, len(indices), CRYSTALS_AT_A_TIME):
        found += [
            _symmetry(*parts) for parts in _one_by_one(dataset.gather(indices[first:][:CRYSTALS_AT_A_TIME]))
        ]
    return found


def cell_shape(frame: np.ndarray) -> dict[str, np.ndarray]:
    """Measure how far reduced cells are from three equal, perpendicular vectors.

    Args:
        frame: vectors of each cell as rows, (n, 3, 3).

    Returns:
        Ratio of the longest to the shortest vector, standard deviation of the log lengths, and square root
        of the ratio of the largest to the smallest eigenvalue of the metric: 1, 0 and 1 for a cube; the last
        is 2 for the primitive cell of fcc, and so tells of skewness as well.
    """
    lengths = np.linalg.norm(frame, axis=2)
    eigenvalues = np.linalg.eigvalsh(frame @ frame.transpose(0, 2, 1))
    return {
        "cell_ratio": lengths.max(axis=1) / lengths.min(axis=1),
        "cell_spread": np.log(lengths).std(axis=1),
        "cell_metric_ratio": np.sqrt(eigenvalues[:, 2] / eigenvalues[:, 0]),
    }


def environment_shape(edge_vec: np.ndarray, atom: np.ndarray, num_atoms: int) -> dict[str, np.ndarray]:
    """Measure how far atoms' neighbours are from lying evenly around them.

    Args:
        edge_vec: vectors to the neighbours, (E, 3).
        atom: whose neighbour each is, (E,).
        num_atoms: N; each has a neighbour.

    Returns:
        (N,) each: fractional anisotropy of the second-moment tensor Σ r rᵀ, from 0 (its eigenvalues are
        equal) to 1 (all neighbours on a line), and the length of Σ r over Σ |r|, from 0 (centred) to 1.
    """
    moment = np.zeros((num_atoms, 3, 3))
    np.add.at(moment, atom, edge_vec[:, :, None] * edge_vec[:, None, :])
    eigenvalues = np.linalg.eigvalsh(moment)
    deviation = eigenvalues - eigenvalues.mean(axis=1, keepdims=True)
    anisotropy = np.sqrt(1.5 * (deviation**2).sum(axis=1) / (eigenvalues**2).sum(axis=1))
    centre, total = np.zeros((num_atoms, 3)), np.zeros(num_atoms)
    np.add.at(centre, atom, edge_vec)
    np.add.at(total, atom, np.linalg.norm(edge_vec, axis=1))
    return {"local_anisotropy": anisotropy, "local_polarity": np.linalg.norm(centre, axis=1) / total}


def _cell_shape(graph: CrystalGraph) -> dict[str, np.ndarray]:
    return cell_shape(graph.frame.numpy())  # a reduced basis of the primitive lattice


def _environments(graph: CrystalGraph) -> dict[str, np.ndarray]:
    shape = environment_shape(graph.edge_vec.numpy(), graph.edge_index[0].numpy(), graph.num_atoms)
    ptr = graph.batch_ptr.numpy()
    return {name: _means(values, ptr) for name, values in shape.items()}


def _size_and_composition(crystals: CrystalBatch) -> dict[str, np.ndarray]:
    ptr, numbers = crystals.batch_ptr.numpy(), crystals.numbers.numpy()
    num_atoms = np.diff(ptr).astype(np.float64)
    volume = torch.linalg.det(crystals.cell).abs().numpy()
    of_element = {int(z): _element(int(z)) for z in np.unique(numbers)}
    of_atom = {
        name: np.array([of_element[int(z)][name] for z in numbers])
        for name in next(iter(of_element.values()))
    }
    mass = np.add.reduceat(of_atom["mass"], ptr[:-1])
    electronegativity = _means(of_atom["electronegativity"], ptr)
    squared = _means((of_atom["electronegativity"] - np.repeat(electronegativity, np.diff(ptr))) ** 2, ptr)
    return {
        "num_atoms": num_atoms,
        "density": mass * _GRAMS_PER_AMU / (volume * _CM3_PER_CUBIC_ANGSTROM),
        "volume_per_atom": volume / num_atoms,
        "mean_atomic_number": _means(numbers.astype(np.float64), ptr),
        "mean_electronegativity": electronegativity,
        "electronegativity_spread": np.sqrt(squared),
        "num_elements": np.array([len(np.unique(numbers[a:b])) for a, b in pairwise(ptr)], np.float64),
        "metal_fraction": _means(of_atom["metal"], ptr),
        "transition_metal_fraction": _means(of_atom["transition_metal"], ptr),
        "oxygen_fraction": _means((numbers == 8).astype(np.float64), ptr),
    }


def _element(number: int) -> dict[str, float]:
    element = Element.from_Z(number)
    with warnings.catch_warnings():  # pymatgen warns where it has no electronegativity, and returns NaN
        warnings.simplefilter("ignore", UserWarning)
        electronegativity = float(element.X)
    return {
        "mass": float(element.atomic_mass),
        "electronegativity": electronegativity,
        "metal": float(element.is_metal),
        "transition_metal": float(element.is_transition_metal),
    }


def _means(values: np.ndarray, ptr: np.ndarray) -> np.ndarray:
    """Return the mean over each crystal's atoms, which begin at `ptr`."""
    return np.add.reduceat(values, ptr[:-1]) / np.diff(ptr)


def _one_by_one(crystals: CrystalBatch) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield atomic numbers, fractional coordinates, cell and periodicity of each crystal."""
    ptr = crystals.batch_ptr.tolist()
    for b, (first, last) in enumerate(pairwise(ptr)):
        atoms = slice(first, last)
        arrays = crystals.numbers[atoms], crystals.frac_coords[atoms], crystals.cell[b], crystals.pbc[b]
        yield tuple(array.numpy() for array in arrays)


def _symmetry(numbers: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> Symmetry:
    if not pbc.all():
        return Symmetry(problem="not periodic in three directions")
    structure = Structure(Lattice(cell), numbers.tolist(), frac_coords)
    try:
        with warnings.catch_warnings():  # of how pymatgen calls spglib
            warnings.simplefilter("ignore", DeprecationWarning)
            analyzer = SpacegroupAnalyzer(structure, symprec=SYMMETRY_PRECISION)
            return Symmetry(analyzer.get_crystal_system(), analyzer.get_space_group_number())
    except Exception as error:  # spglib and pymatgen raise types of their own, and TypeError, for bad cells
        return Symmetry(problem=f"{type(error).__name__}: {error}")
