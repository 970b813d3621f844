"""Pairs of distinct crystals that are hard to tell apart, each with the reason why.

Every crystal is built here from the parameters that its function states; lengths are in Å. Within a pair the
composition and the volume per atom are equal, so that the arrangement alone can tell the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pymatgen.core import Lattice, Structure

_LAYERS = {"A": (0.0, 0.0), "B": (1 / 3, 2 / 3), "C": (2 / 3, 1 / 3)}


@dataclass(frozen=True)
class Pair:
    """Two crystals of equal composition.

    Attributes:
        name: of the pair.
        build: returns both crystals.
        why: what they have in common.
        source: where that is known from.
        mirror: whether they are mirror images of each other. Those have the same energy, so a network that
            predicts it need not tell them apart.
    """

    name: str
    build: Callable[[], tuple[Structure, Structure]]
    why: str
    source: str
    mirror: bool = False


def close_packed(stacking: str, element: str = "Co", distance: float = 2.5) -> Structure:
    """Stack ideal close-packed layers, as "ABC" (fcc) or "AB" (hcp).

    Args:
        stacking: positions A, B, C of the layers of a period; neighbouring ones differ.
        element: of all atoms.
        distance: of nearest neighbours.
    """
    height = distance * np.sqrt(2 / 3)
    lattice = Lattice.hexagonal(distance, height * len(stacking))
    coords = [[*_LAYERS[layer], i / len(stacking)] for i, layer in enumerate(stacking)]
    return Structure(lattice, [element] * len(stacking), coords)


def tetrahedral(stacking: str, elements: tuple[str, str] = ("Zn", "S"), bond: float = 2.34) -> Structure:
    """Stack ideal tetrahedral double layers: "ABC" is zincblende or diamond, "AB" wurtzite or lonsdaleite.

    Args:
        stacking: positions of the double layers of a period.
        elements: of the two layers of a double layer.
        bond: length of all bonds, which meet at tetrahedral angles.
    """
    layer = bond * 4 / 3
    lattice = Lattice.hexagonal(bond * np.sqrt(8 / 3), layer * len(stacking))
    species, coords = [], []
    for i, position in enumerate(stacking):
        below = _LAYERS[position]
        species += elements
        coords += [[*below, i / len(stacking)], [*below, (i + 3 / 4) / len(stacking)]]
    return Structure(lattice, species, coords)


def quartz(handedness: int) -> Structure:
    """Build α-quartz: P3₂21 (handedness 1), or its mirror image in P3₁21 (−1)."""
    lattice = Lattice.hexagonal(4.916, 5.4054)
    coords = np.array([[0.4697, 0, 2 / 3], [0.4135, 0.2669, 0.1191 + 2 / 3]])
    coords[:, 2] *= handedness
    # The reflection z → −z maps one group's axes on the other's.
    return Structure.from_spacegroup("P3_221" if handedness > 0 else "P3_121", lattice, ["Si", "O"], coords)


def tellurium(handedness: int) -> Structure:
    """Build trigonal tellurium: helices along P3₁21 (handedness 1) or P3₂21 (−1)."""
    lattice, x = Lattice.hexagonal(4.4572, 5.929), 0.2633
    heights = [handedness / 3, 2 * handedness / 3, 0]
    coords = [[*place, z] for place, z in zip(((x, 0), (0, x), (-x, -x)), heights, strict=True)]
    return Structure(lattice, ["Te"] * 3, coords)


def bixbyite_metals(u: float) -> Structure:
    """Build the metal sublattice of bixbyite: Ia-3, 8b and 24d with the parameter u, cell 9.414."""
    return Structure.from_spacegroup(
        "Ia-3", Lattice.cubic(9.414), ["Mn", "Mn"], [[0.25, 0.25, 0.25], [u, 0, 0.25]]
    )


def chains(places: Sequence[int], period: int, step: float, gap: float) -> Structure:
    """Build straight chains of selenium, side by side on a square, with some equally spaced places occupied.

    Args:
        places: that hold an atom.
        period: number of places.
        step: distance of neighbouring places.
        gap: distance of the chains.
    """
    lattice = Lattice.orthorhombic(gap, gap, period * step)
    return Structure(lattice, ["Se"] * len(places), [[0, 0, place / period] for place in places])


def ring(places: Sequence[int], period: int = 8, radius: float = 2.1, gap: float = 9.0) -> Structure:
    """Build a palladium atom with hydrogen at some corners of a regular polygon around it, in a cubic cell.

    Args:
        places: corners that hold an atom.
        period: number of corners.
        radius: of the polygon.
        gap: length of the cell.
    """
    angle = 2 * np.pi * np.array(places) / period
    corners = radius * np.stack((np.cos(angle), np.sin(angle), np.zeros(len(places))), axis=1)
    return Structure(
        Lattice.cubic(gap), ["Pd", *["H"] * len(places)], [[0, 0, 0], *corners], coords_are_cartesian=True
    )


def graphite(shift: float, spacing: float = 3.35) -> Structure:
    """Stack two graphene sheets a cell, the second shifted along the bonds.

    Args:
        shift: in bond lengths of 1.42: 1 is the AB stacking of graphite, 1/2 the saddle point.
        spacing: of the sheets.
    """
    lattice = Lattice.hexagonal(1.42 * np.sqrt(3), 2 * spacing)
    bond = np.array([1 / 3, 2 / 3, 0])
    sheet = np.array([np.zeros(3), bond])
    return Structure(lattice, ["C"] * 4, np.concatenate((sheet, sheet + shift * bond + [0, 0, 0.5])))


def _of(build: Callable[..., Structure], first: tuple, second: tuple) -> Callable:
    """Return a function that builds both crystals of a pair."""
    return lambda: (build(*first), build(*second))


_TEXTBOOK = "Ashcroft and Mermin, Solid State Physics (1976), chapter 4"
_PATTERSON = "Patterson, Phys. Rev. 65, 195 (1944): cyclotomic homometric sets"
_ONE_SHELL = "the same shells of neighbours at the same distances, up to the twelfth neighbour and beyond"
_POLYTYPES = "ACBCBCBCBCAC", "ACBCBCBCACAC"
_SEQUENCE = (
    "every sequence of six neighbouring layers occurs equally often; the order in which they follow differs"
)

PAIRS = (
    Pair("fcc / hcp", _of(close_packed, ("ABC",), ("AB",)), f"{_ONE_SHELL}; only angles differ", _TEXTBOOK),
    Pair(
        "diamond / lonsdaleite",
        _of(tetrahedral, ("ABC", ("C", "C"), 1.54), ("AB", ("C", "C"), 1.54)),
        f"{_ONE_SHELL}; only angles differ",
        _TEXTBOOK,
    ),
    Pair(
        "zincblende / wurtzite",
        _of(tetrahedral, ("ABC",), ("AB",)),
        f"{_ONE_SHELL}; only angles differ",
        _TEXTBOOK,
    ),
    Pair(
        "close-packed 12-layer polytypes",
        _of(close_packed, _POLYTYPES[:1], _POLYTYPES[1:]),
        _SEQUENCE,
        "found by exhaustive search over stackings",
    ),
    Pair(
        "SiC 12-layer polytypes",
        _of(tetrahedral, (_POLYTYPES[0], ("Si", "C"), 1.89), (_POLYTYPES[1], ("Si", "C"), 1.89)),
        _SEQUENCE,
        "found by exhaustive search over stackings",
    ),
    Pair(
        "graphite AB / slipped",
        _of(graphite, (1,), (0.5,)),
        "the same sheets, and the twelve nearest neighbours of an atom lie in its own",
        "Bernal, Proc. R. Soc. A 106, 749 (1924), for AB",
    ),
    Pair(
        "bixbyite metals u / −u",
        _of(bixbyite_metals, (0.03,), (-0.03,)),
        "equal distances from each atom to all others, at any range; not mirror images",
        "Pauling and Shappell, Z. Kristallogr. 75, 128 (1930); Patterson, Nature 143, 939 (1939)",
    ),
    Pair(
        "chains {0,3,4,5} / {0,4,5,7} of 8",
        _of(chains, ([0, 3, 4, 5], 8, 2.4, 8.0), ([0, 4, 5, 7], 8, 2.4, 8.0)),
        "equal pair distances in all, at any range",
        _PATTERSON,
    ),
    Pair(
        "chains {0,1,4,10,12,17} / {0,1,8,11,13,17}",
        _of(chains, ([0, 1, 4, 10, 12, 17], 40, 1.2, 20.0), ([0, 1, 8, 11, 13, 17], 40, 1.2, 20.0)),
        "equal pair distances within a chain's six atoms",
        "Bloom, J. Combin. Theory A 22, 378 (1977): counterexample to Piccard's theorem",
    ),
    Pair(
        "chains S15 / Q15",
        _of(
            chains,
            ([0, 1, 3, 4, 5, 7, 9, 10, 12], 15, 2.4, 8.0),
            ([0, 1, 3, 4, 6, 8, 9, 12, 14], 15, 2.4, 8.0),
        ),
        "equal pair distances in all, at any range, and equal density functions",
        "Edelsbrunner et al., SoCG 2021: periodic sets with equal density functions",
    ),
    Pair(
        "rings {0,3,4,5} / {0,4,5,7} of 8",
        _of(ring, ([0, 3, 4, 5],), ([0, 4, 5, 7],)),
        "equal distances and angles, as multisets, around the central atom",
        "environments degenerate in the sense of Pozdnyakov et al., Phys. Rev. Lett. 125, 166001 (2020), on "
        "Patterson's sets",
    ),
    Pair(
        "α-quartz P3₁21 / P3₂21",
        _of(quartz, (-1,), (1,)),
        "mirror images",
        "Levien, Prewitt and Weidner, Am. Mineral. 65, 920 (1980)",
        mirror=True,
    ),
    Pair(
        "tellurium P3₁21 / P3₂21",
        _of(tellurium, (1,), (-1,)),
        "mirror images",
        "Cherin and Unger, Acta Cryst. 23, 670 (1967)",
        mirror=True,
    ),
)
"""The library of pairs."""
