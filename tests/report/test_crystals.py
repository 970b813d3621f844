"""Crystals as the report describes and draws them."""

import re

import numpy as np
import pytest

from mgt_fast.report.crystals import MOST_ATOMS, describe, draw_crystal
from mgt_fast.structures import CrystalBatch

NACL = {
    "numbers": [11] * 4 + [17] * 4,
    "frac_coords": [
        *([0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]),
        *([0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]),
    ],
    "cell": [5.64 * np.eye(3)],
    "num_atoms": [8],
}
PERIODIC = np.ones(3, bool)


def circles(drawing):
    """Centres of the atoms, (n, 2), and their colours."""
    found = re.findall(
        r'<circle cx="([-\d.]+)" cy="([-\d.]+)" r="[\d.]+" fill="(#\w+)" class="atom">', drawing
    )
    return np.array([(float(x), float(y)) for x, y, _ in found]), [color for *_, color in found]


def test_rock_salt():
    facts = describe(CrystalBatch.from_arrays(**NACL))
    assert (facts.formula, facts.num_atoms, facts.space_group, facts.system) == (
        "NaCl",
        8,
        "Fm-3m (225)",
        "cubic",
    )
    assert [(symbol, count) for symbol, count, _ in facts.elements] == [("Na", 4), ("Cl", 4)]
    _, colors = circles(facts.drawing)
    sodium, chlorine = (color for *_, color in facts.elements)
    # The conventional cell with its boundary: 8 corners and 6 faces; 12 edges and the centre.
    assert (colors.count(sodium), colors.count(chlorine)) == (14, 13)
    assert "<line" not in describe(CrystalBatch.from_arrays(**NACL), draw=False).__repr__()


def test_a_drawing_keeps_the_crystal_in_view_and_in_proportion():
    cell = np.array([[3.0, 0, 0], [0, 4.0, 0], [0, 0, 9.0]])
    drawing = draw_crystal(np.array([6]), np.zeros((1, 3)), cell, PERIODIC)
    places, _ = circles(drawing)
    assert len(places) == 8
    assert places.min() > 0
    assert places.max() < 200
    # A parallel projection: opposite edges stay parallel, whose sums are those of the lattice vectors.
    height = np.ptp(places[:, 1])
    assert height > 1.5 * np.ptp(places[:, 0])


def test_the_view_does_not_mirror():
    """Seen along c, with a to the front: b is on the right for a right-handed cell, on the left otherwise."""
    frac = np.array([[0.0, 0, 0], [0, 0.5, 0]])
    for hand in (1, -1):
        cell = np.diag([5.0, hand * 5.0, 5.0])
        places, colors = circles(draw_crystal(np.array([1, 8]), frac, cell, np.zeros(3, bool)))
        oxygen, hydrogen = (places[colors.index(color)] for color in ("#ff0d0d", "#ffffff"))
        assert np.sign(oxygen[0] - hydrogen[0]) == hand


def test_a_turned_crystal_is_drawn_alike():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    cell = np.array([[3.0, 0.2, 0], [0.4, 4.0, 0.1], [0, 0.3, 5.0]])
    frac = np.random.default_rng(1).random((5, 3))
    drawings = [draw_crystal(np.arange(1, 6), frac, c, PERIODIC) for c in (cell, cell @ rotation.T)]
    for one, other in zip(*(circles(drawing) for drawing in drawings), strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_allclose(one, other, atol=0.02)
        else:
            assert one == other


def test_atoms_outside_the_cell_come_home():
    frac = np.array([[0.3, 0.4, 0.6]])
    home, away = (
        draw_crystal(np.array([6]), frac + shift, 4 * np.eye(3), PERIODIC) for shift in (0, [3, -2, 1])
    )
    np.testing.assert_allclose(circles(home)[0], circles(away)[0], atol=0.02)
    slab = np.array([True, True, False])
    assert not np.allclose(
        circles(draw_crystal(np.array([6]), frac + np.array([0, 0, 1]), 4 * np.eye(3), slab))[0],
        circles(home)[0],
        atol=1,
    )


def test_large_crystals_are_not_drawn():
    count = MOST_ATOMS + 1
    frac = np.random.default_rng(0).random((count, 3))
    assert draw_crystal(np.full(count, 6), frac, 20 * np.eye(3), PERIODIC) is None


def test_symmetry_that_there_is_not():
    slab = CrystalBatch.from_arrays(**NACL, pbc=[[True, True, False]])
    assert describe(slab).space_group == "not periodic in all directions"
    twice = NACL | {"numbers": [11, 11], "frac_coords": np.zeros((2, 3)), "num_atoms": [2]}
    assert describe(CrystalBatch.from_arrays(**twice)).space_group == "not found"


@pytest.mark.parametrize("atomic_number", [1, 109, 110, 118])
def test_every_element_has_a_colour(atomic_number):
    batch = CrystalBatch.from_arrays([atomic_number], np.zeros((1, 3)), [4 * np.eye(3)], [1])
    ((_, count, color),) = describe(batch).elements
    assert count == 1
    assert re.fullmatch("#[0-9a-f]{6}", color)
