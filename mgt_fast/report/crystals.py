"""Crystals of the report: read from the dataset that the run used, described, and drawn."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from markupsafe import Markup

from ..data import CrystalDataset
from ..data.manifest import MANIFEST, DatasetError, hash_file
from ..data.store import BUNDLED
from ..structures import CrystalBatch
from .record import RunRecord
from .svg import element, picture

MOST_ATOMS = 250
"""Atoms of a crystal that is drawn, copies on the cell's boundary included."""
SYMPREC = 0.01  # Å, within which two atoms count as symmetry-equivalent
_SIZE, _MARGIN = 200, 10
_BOND = 1.15  # of the sum of covalent radii; nearer atoms are joined
_RADIUS = 0.45  # of the covalent radius
_PIECES = 6  # of a line, sorted by depth each
# Rows: right, up and towards the reader; a lies to the front, b to the right, c upwards.
_AZIMUTH, _ELEVATION = np.radians(-72.0), np.radians(14.0)


@dataclass(frozen=True)
class CrystalFacts:
    """What the report says of a crystal.

    Attributes:
        formula: reduced.
        num_atoms: in the cell.
        space_group: symbol and number, or "not found".
        system: crystal system, or "".
        elements: symbol, number in the cell and colour of each element.
        drawing: the cell in SVG, or None for a large one.
    """

    formula: str
    num_atoms: int
    space_group: str
    system: str
    elements: Sequence[tuple[str, int, str]]
    drawing: Markup | None


def open_dataset_of(run: RunRecord) -> tuple[CrystalDataset | None, str]:
    """Open the dataset of a run, or return None and why there are no structures.

    Its files are not hashed again: the manifest must be the one that the run saw, and it holds their hashes.
    """
    path = run.config.data.path or BUNDLED
    expected = (run.environment or {}).get("dataset") or (None if run.meta is None else run.meta.dataset)
    if not (path / MANIFEST).is_file():
        return (
            None,
            f"the dataset {path} that the run used is not there; put it back and write the report again",
        )
    found = hash_file(path / MANIFEST)
    if expected is None:
        return None, "the run does not say which dataset it used"
    if found != expected:
        return None, (
            f"{path} is not the dataset that the run used: the SHA-256 of its manifest is {found[:12]}…, not "
            f"{str(expected)[:12]}…; put that one back and write the report again"
        )
    try:
        return CrystalDataset.open(path, verify=False), ""
    except DatasetError as error:
        return None, str(error)


def positions(dataset: CrystalDataset, ids: Sequence[str]) -> dict[str, int]:
    """Return where some crystals stand in the dataset; those it does not hold are left out."""
    wanted = set(ids)
    return {name: position for position, name in enumerate(dataset.ids) if name in wanted}


def describe(crystal: CrystalBatch, draw: bool = True) -> CrystalFacts:
    """Describe the one crystal of a batch.

    Args:
        crystal: the batch.
        draw: whether to draw it.
    """
    from pymatgen.core import Composition, Element

    numbers = crystal.numbers.numpy()
    atomic, counts = np.unique(numbers, return_counts=True)
    elements = [
        (Element.from_Z(z).symbol, count, _color(z))
        for z, count in zip(atomic.tolist(), counts.tolist(), strict=True)
    ]
    space_group, system = _symmetry(crystal)
    drawing = None
    if draw:
        drawing = draw_crystal(
            numbers, crystal.frac_coords.numpy(), crystal.cell[0].numpy(), crystal.pbc[0].numpy()
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of elements without an electronegativity, which sorts them
        formula = Composition({symbol: count for symbol, count, _ in elements}).reduced_formula
    return CrystalFacts(formula, len(numbers), space_group, system, elements, drawing)


def _symmetry(crystal: CrystalBatch) -> tuple[str, str]:
    """Return the space group and the crystal system of a crystal periodic in all directions."""
    from pymatgen.core import Lattice, Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer, SymmetryUndeterminedError

    if not bool(crystal.pbc.all()):
        return "not periodic in all directions", ""
    structure = Structure(
        Lattice(crystal.cell[0].numpy()), crystal.numbers.tolist(), crystal.frac_coords.numpy()
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of spglib, about its own interface
            analyzer = SpacegroupAnalyzer(structure, symprec=SYMPREC)
            symbol, number = analyzer.get_space_group_symbol(), analyzer.get_space_group_number()
            return f"{symbol} ({number})", analyzer.get_crystal_system()
    except (SymmetryUndeterminedError, ValueError, TypeError):  # atoms on top of each other
        return "not found", ""


def draw_crystal(
    numbers: np.ndarray, frac_coords: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> Markup | None:
    """Draw a unit cell in parallel projection: edges, atoms in Jmol's colours, and bonds between near atoms.

    Atoms on the boundary of the cell are drawn on each of its sides.

    Args:
        numbers: atomic numbers, (N,).
        frac_coords: fractional coordinates, (N, 3).
        cell: lattice vectors as rows, (3, 3), Å.
        pbc: periodic along each lattice vector, (3,) bool.

    Returns:
        The drawing; None if it would show more than `MOST_ATOMS` atoms.
    """
    if len(numbers) > MOST_ATOMS:
        return None
    numbers, frac = _with_boundary(numbers, frac_coords, pbc)
    if len(numbers) > MOST_ATOMS:
        return None
    view = _view(cell)
    atoms = frac @ cell @ view.T
    corners = np.array(list(itertools.product((0.0, 1.0), repeat=3)))
    at_corner = corners @ cell @ view.T
    radii = _RADIUS * covalent_radii[numbers]
    low = np.minimum(at_corner.min(0), (atoms - radii[:, None]).min(0))[:2]
    high = np.maximum(at_corner.max(0), (atoms + radii[:, None]).max(0))[:2]
    scale = (_SIZE - 2 * _MARGIN) / float((high - low).max())
    middle = (low + high) / 2

    def on_page(points: np.ndarray) -> np.ndarray:
        return (points[..., :2] - middle) * (scale, -scale) + _SIZE / 2

    shapes: list[tuple[float, Markup]] = []

    def line(start: np.ndarray, end: np.ndarray, style: str) -> None:
        points = start + np.linspace(0, 1, _PIECES + 1)[:, None] * (end - start)
        for (x1, y1), (x2, y2), depth in zip(
            on_page(points[:-1]).tolist(),
            on_page(points[1:]).tolist(),
            ((points[:-1] + points[1:]) / 2)[:, 2].tolist(),
            strict=True,
        ):
            shapes.append((depth, element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)))

    for i, j in itertools.combinations(range(8), 2):
        if np.abs(corners[i] - corners[j]).sum() == 1:
            line(at_corner[i], at_corner[j], "edge")
    for i, j in _bonds(numbers, atoms):
        line(atoms[i], atoms[j], "bond")
    for (x, y), depth, radius, z in zip(
        on_page(atoms).tolist(), atoms[:, 2].tolist(), (radii * scale).tolist(), numbers.tolist(), strict=True
    ):
        ball = element("circle", cx=x, cy=y, r=radius, fill=_color(z), class_="atom")
        sheen = element("circle", cx=x, cy=y, r=radius, fill="url(#sheen)")
        shapes.append((depth + radius / scale, ball + sheen))
    shapes.sort(key=lambda shape: shape[0])
    return picture("Unit cell with its atoms", _SIZE, _SIZE, [shape for _, shape in shapes])


def _with_boundary(
    numbers: np.ndarray, frac_coords: np.ndarray, pbc: np.ndarray, near: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """Move atoms into the cell where it is periodic; copy those on its boundary to the other side."""
    frac = np.where(pbc, frac_coords - np.floor(frac_coords), frac_coords)
    frac = np.where(pbc & (frac > 1 - near), frac - 1, frac)
    for axis in np.flatnonzero(pbc):
        copied = np.abs(frac[:, axis]) < near
        shifted = frac[copied] + np.eye(3)[axis]
        numbers, frac = np.concatenate([numbers, numbers[copied]]), np.concatenate([frac, shifted])
    return numbers, frac


def _view(cell: np.ndarray) -> np.ndarray:
    """Return the rotation whose rows point right, up and to the reader, (3, 3): c upwards, a to the front."""
    up = cell[2] / np.linalg.norm(cell[2])
    front = cell[0] - (cell[0] @ up) * up
    front /= np.linalg.norm(front)
    upright = np.stack([np.cross(up, front), up, front])  # right, up, towards the reader
    cos, sin = np.cos(_AZIMUTH + np.pi / 2), np.sin(_AZIMUTH + np.pi / 2)
    turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    cos, sin = np.cos(_ELEVATION), np.sin(_ELEVATION)
    tilt = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return tilt @ turn @ upright


def _bonds(numbers: np.ndarray, atoms: np.ndarray) -> np.ndarray:
    """Return pairs of drawn atoms that are near enough to be joined, (k, 2)."""
    distance = np.linalg.norm(atoms[:, None] - atoms[None], axis=-1)
    reach = _BOND * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    return np.argwhere(np.triu((distance < reach) & (distance > 0.1), 1))


def _color(atomic_number: int) -> str:
    """Return an element's colour in Jmol; grey beyond its table."""
    known = atomic_number < len(jmol_colors)
    rgb = jmol_colors[atomic_number] if known else (0.6, 0.6, 0.6)
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
