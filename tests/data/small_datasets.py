"""Small datasets to test on."""

import numpy as np

from mgt_fast.data import DatasetWriter, Target
from mgt_fast.data.store import record_batch

TARGETS = {"energy": Target("eV", "an energy"), "gap": Target("eV")}
PARTS = ("train", "", "val", "test")


def random_crystals(n, rng):
    """Arguments of record_batch; positions and cells are numbers like any others, no real crystals."""
    sizes = rng.integers(1, 9, n)
    return {
        "ids": [f"crystal-{i}-é" for i in range(n)],
        "numbers": [rng.integers(1, 100, size) for size in sizes],
        "frac_coords": [rng.normal(size=(size, 3)) for size in sizes],
        "cell": rng.normal(size=(n, 3, 3)),
        "pbc": rng.random((n, 3)) < 0.5,
        "split": [PARTS[i % 4] for i in range(n)],
        "targets": {
            "energy": rng.normal(size=n),
            "gap": np.where(rng.random(n) < 0.5, np.nan, rng.random(n)),
        },
    }


def lattices(n, rng):
    """The same of crystals that have graphs: one to four atoms in cells of 4 to 8 Å, well apart."""
    crystals = random_crystals(n, rng)
    sizes = rng.integers(1, 5, n)
    corners = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    crystals["numbers"] = [rng.integers(1, 90, size) for size in sizes]
    crystals["frac_coords"] = [corners[:size] + rng.uniform(-0.05, 0.05, (size, 3)) for size in sizes]
    crystals["cell"] = np.stack([np.diag(rng.uniform(4, 8, 3)) for _ in range(n)])
    crystals["pbc"] = np.ones((n, 3), bool)
    return crystals


def write(path, crystals, shard_size=7, edge_counts=None, **options):
    """Write a dataset; `edge_counts` maps (max_neighbors, shell_tolerance) to counts."""
    with DatasetWriter(path, TARGETS, shard_size=shard_size, **options) as writer:
        writer.write(record_batch(**crystals))
        writer.written()
        for key, counts in (edge_counts or {}).items():
            writer.add_edge_counts(counts, *key)
    return path
