"""Prepared datasets as inputs of `prepare`: joined with others, bit for bit, nothing lost on the way."""

import json

import numpy as np
import pytest
import torch

from mgt_fast.data import CrystalDataset, PrepareError, prepare

CELL = [[4.0, 0.0, 0.0], [0.1, 4.3, 0.0], [0.0, 0.7, 3.9]]
FIELDS = ("numbers", "frac_coords", "cell", "pbc", "batch_ptr")


def made(tmp_path, name, first, count, unit="eV", gap=1.0, **options):
    """Prepare some salts of which every third has no gap."""
    rows = [
        {
            "id": f"{name}-{i}",
            "atomic_numbers": [11, 17],
            "cell": CELL,
            "positions": [[0.1 * i, 0.0, 0.3], [2.0, 2.0 + 0.01 * i, 2.0]],
            "gap": None if i % 3 == 2 else gap * i,
            "split": ["train", "val", ""][i % 3],
        }
        for i in range(first, first + count)
    ]
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(rows))
    options = {"units": {"gap": unit} if unit else None, "require_target": "none", "workers": 0} | options
    prepare(file, tmp_path / name, **options)
    return tmp_path / name


def test_datasets_are_joined_with_targets_units_and_parts(tmp_path):
    paths = [made(tmp_path, "a", 0, 7), made(tmp_path, "b", 3, 5)]
    summary = prepare(paths, tmp_path / "both", require_target="none", workers=1)
    assert (summary.stored, summary.rejected) == (12, 0)
    both, parts = CrystalDataset.open(tmp_path / "both"), [CrystalDataset.open(path) for path in paths]
    assert list(both.ids) == [*parts[0].ids, *parts[1].ids]
    assert both.target_units == {"gap": "eV"}
    np.testing.assert_array_equal(both.targets["gap"], np.concatenate([p.targets["gap"] for p in parts]))
    np.testing.assert_array_equal(both.split, np.concatenate([p.split for p in parts]))
    joined, first = both.gather(np.arange(7)), parts[0].gather(np.arange(7))
    assert all(torch.equal(getattr(joined, name), getattr(first, name)) for name in FIELDS)


def test_the_bundled_dataset_is_read_by_name(tmp_path):
    summary = prepare(
        ["bundled", made(tmp_path, "a", 0, 3)],
        tmp_path / "all",
        require_target="none",
        workers=0,
        max_neighbors=None,
    )
    bundled, found = CrystalDataset.open(), CrystalDataset.open(tmp_path / "all")
    assert summary.stored == len(bundled) + 3
    assert {**bundled.target_units, "gap": "eV"}.items() >= found.target_units.items()
    assert found.target_info["formation_energy_per_atom"] == bundled.target_info["formation_energy_per_atom"]
    chosen = np.arange(0, len(bundled), 50)
    ours, theirs = found.gather(chosen), bundled.gather(chosen)
    assert all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in FIELDS)


def test_a_crystal_in_both_is_rejected_once(tmp_path):
    a = made(tmp_path, "a", 0, 4)
    summary = prepare([a, a], tmp_path / "twice", require_target="none", workers=0)
    assert (summary.stored, summary.by_reason) == (4, {"duplicate_id": 4})


def test_units_that_differ_are_refused(tmp_path):
    paths = [made(tmp_path, "a", 0, 4), made(tmp_path, "b", 0, 4, unit="meV")]
    with pytest.raises(PrepareError, match=r"b: gap is in meV, but in eV in an earlier input"):
        prepare(paths, tmp_path / "both", workers=0)
    assert not (tmp_path / "both").exists()
    summary = prepare(paths, tmp_path / "both", targets=[], require_target="none", workers=0)
    assert summary.stored == 8  # of what is not stored no unit matters


def test_a_unit_that_the_user_gives_wins(tmp_path):
    paths = [made(tmp_path, "a", 0, 4), made(tmp_path, "b", 0, 4)]
    prepare(paths, tmp_path / "both", units={"gap": "Ry"}, require_target="none", workers=0)
    assert CrystalDataset.open(tmp_path / "both").target_units == {"gap": "Ry"}
