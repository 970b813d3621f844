"""Hostile crystals that come as arrays and objects: strategies of hypothesis."""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from hypothesis import strategies as st
from pymatgen.core import DummySpecies, Lattice, Species, Structure

from mgt_fast import CrystalBatch

ODD_NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-320,
    1e-160,
    1e-12,
    1e-3,
    0.3,
    90.0,
    1e3,
    1e6,
    1e7,
    2.0**20,
    2.0**31,
    1e19,
]
ODD_NUMBERS += [
    1e154,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
    1 / 3,
    0.999999999999,
    1 - 2**-53,
]
ODD_INTEGERS = [0, -1, 1, 2, 26, 83, 89, 100, 104, 118, 119, 255, 256, 2**31, 2**63 - 1, -(2**63)]
DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "uint8",
    "int32",
    "int64",
    "uint64",
    "bool",
    "complex128",
    "U3",
    "object",
]
FIELDS = ("numbers", "frac_coords", "cell", "num_atoms", "pbc")

odd = st.one_of(st.sampled_from(ODD_NUMBERS), st.floats(width=64), st.floats(-2, 2))


@st.composite
def sound_arrays(draw) -> dict:
    """Draw a batch of crystals with nothing wrong, or hardly anything: atoms may be close to one another."""
    num_atoms = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    total, count = sum(num_atoms), len(num_atoms)
    side = draw(st.sampled_from([2.0, 4.0, 4.0, 9.0, 40.0]))
    return {
        "numbers": rng.integers(1, 95, total),
        "frac_coords": rng.random((total, 3)),
        "cell": np.eye(3) * side + rng.normal(scale=0.1 * side, size=(count, 3, 3)),
        "num_atoms": np.array(num_atoms),
        "pbc": np.ones((count, 3), dtype=bool),
    }


def _odd_entry(draw, array: np.ndarray) -> np.ndarray:
    if array.size:
        values = ODD_INTEGERS if array.dtype.kind in "iu" else ODD_NUMBERS
        index = draw(st.integers(0, array.size - 1))
        with np.errstate(all="ignore"):
            array.flat[index] = np.array(draw(st.sampled_from(values))).astype(array.dtype)
    return array


def _mutated(draw, array: np.ndarray):
    """Return an array that differs in a value, in shape, type, layout, or altogether."""
    kind = draw(st.integers(0, 13))
    match kind:
        case 0 | 1 | 2 | 3:
            return _odd_entry(draw, array)
        case 4:
            shape = draw(st.sampled_from([(), (0,), (1,), (-1,), (0, 3), (1, 1, 3), (3, 0, 3)]))
            try:
                return array.reshape(shape)
            except ValueError:
                return np.resize(array, tuple(max(n, 0) for n in shape))
        case 5:
            with np.errstate(all="ignore"):
                return array.astype(draw(st.sampled_from(DTYPES)))
        case 6:
            return np.asfortranarray(array)[::-1]
        case 7:
            array.setflags(write=False)
            return np.repeat(array, 2, axis=0)[::2]
        case 8:
            return array[:-1]
        case 9:
            return np.concatenate([array, array])
        case 10:
            return np.zeros_like(array)
        case 11:
            return array.tolist()
        case 12:
            return draw(
                st.sampled_from([None, "x", [], [[]], [[1], [1, 2]], {}, object(), 1.5, True, b"ab", set()])
            )
        case 13:
            return np.broadcast_to(array.flat[0] if array.size else 0, array.shape)


@st.composite
def hostile_arrays(draw) -> dict:
    """Draw arguments of `CrystalBatch.from_arrays`."""
    arrays = draw(sound_arrays())
    for field in draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
        value = arrays[field]
        if isinstance(value, np.ndarray) and value.ndim:  # not one that is odd already
            arrays[field] = _mutated(draw, value.copy())
    return arrays


@st.composite
def hostile_batches(draw) -> CrystalBatch:
    """Draw a batch made without its checks: tensors of any shape, type and layout."""
    arrays = draw(sound_arrays())
    batch = CrystalBatch.from_arrays(**arrays)
    fields = {name: getattr(batch, name) for name in ("numbers", "frac_coords", "cell", "batch_ptr", "pbc")}
    name = draw(st.sampled_from(list(fields)))
    value = fields[name]
    match draw(st.integers(0, 7)):
        case 0 | 1:
            fields[name] = torch.from_numpy(_odd_entry(draw, value.numpy().copy()))
        case 2:
            fields[name] = value.to(
                draw(st.sampled_from([torch.int32, torch.float32, torch.bool, torch.complex64]))
            )
        case 3:
            fields[name] = value[draw(st.sampled_from([slice(0, 0), slice(1, None), slice(None, None, 2)]))]
        case 4:
            fields[name] = value.flip(0)
        case 5:
            fields[name] = value.unsqueeze(0) if draw(st.booleans()) else torch.cat([value, value])
        case 6:
            fields[name] = value.T if value.ndim == 2 else value.expand(2, *value.shape)
        case 7:
            ids = draw(st.sampled_from([(), ("a",), ("a",) * 9, tuple("abc")]))
            return CrystalBatch(**fields, ids=ids)
    return CrystalBatch(**fields, ids=batch.ids)


@st.composite
def _ase_atoms(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(0, 5))
    cell = np.array(
        draw(st.sampled_from([np.eye(3) * 4, np.zeros((3, 3)), np.eye(3) * 1e-3, np.diag([5.0, 5, 0])]))
    )
    atoms = Atoms(rng.integers(0, 119, n), rng.random((n, 3)) * 4, cell=_odd_cell(draw, cell))
    atoms.pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    if n and draw(st.booleans()):
        atoms.positions[draw(st.integers(0, n - 1))] = draw(odd)
    return atoms


def _odd_cell(draw, cell: np.ndarray) -> np.ndarray:
    return _odd_entry(draw, cell.copy()) if draw(st.booleans()) else cell


@st.composite
def _structures(draw):
    species = [
        "Na",
        "Cl",
        "D",
        "Og",
        Species("Fe", 2.5),
        Species("O", -2, {"spin": 5}) if draw(st.booleans()) else Species("O", -2),
        DummySpecies("X"),
        {"Na": 0.5, "K": 0.5},
        {"Na": 0.5},
    ]
    n = draw(st.integers(0, 4))
    chosen = [draw(st.sampled_from(species)) for _ in range(n)]
    coords = [[draw(odd) for _ in range(3)] for _ in range(n)]
    lattice = Lattice(
        _odd_cell(draw, np.eye(3) * 4), pbc=draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    )
    return Structure(lattice, chosen, coords)


def hostile_structures():
    """Return a strategy of lists of pymatgen Structures, ASE Atoms and other things."""
    things = st.sampled_from([None, 1, "NaCl", [], {}, object()])
    one = st.one_of(_ase_atoms(), _ase_atoms(), _structures(), _structures(), things)
    return st.lists(one, max_size=3)
