"""Input features of the chemical elements: the 92 CGCNN entries of every atomic number."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch

from ..structures import MAX_ATOMIC_NUMBER

NUM_FEATURES = 92
FEATURES_FILE = Path(__file__).with_name("cgcnn_features.txt")


@cache
def _read_features() -> torch.Tensor:
    # What is kept must not depend on a default device (torch.device as a context) at the first call.
    features = torch.full((MAX_ATOMIC_NUMBER + 1, NUM_FEATURES), torch.nan, device="cpu")
    features[0] = 0
    for line in FEATURES_FILE.read_text().splitlines():
        if not line.startswith("#"):
            atomic_number, bits = line.split()
            features[int(atomic_number)] = torch.tensor(
                [float(b) for b in f"{int(bits, 16):0{NUM_FEATURES}b}"], device="cpu"
            )
    return features


def cgcnn_features() -> torch.Tensor:
    """Return the CGCNN features of every element.

    The 92 entries are one-hot codes of group, period, electronegativity, covalent radius, valence electrons,
    first ionisation energy, electron affinity, block and atomic volume.

    Returns:
        (119, 92) float32, one row an atomic number. Row 0 is zero (no element has it); the rows of elements
        without published features (101 Md and beyond) are NaN, so that they can be told apart.

    Source: T. Xie and J. C. Grossman, Phys. Rev. Lett. 120, 145301 (2018), as shipped by jarvis-tools
    (`get_node_attributes(symbol, "cgcnn")`; MIT licence, K. Choudhary); `make_cgcnn_features.py` made the
    file that is read here.
    """
    return _read_features().clone()


@cache
def has_features() -> np.ndarray:
    """Return which atomic numbers have features, (119,) bool; 0 has none."""
    known = ~_read_features().isnan().any(dim=1).numpy()
    known[0] = False
    return known
