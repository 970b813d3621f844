import json

import numpy as np
import pytest

from mgt_fast.data import CrystalDataset, DatasetWriter, Target
from mgt_fast.data.store import record_batch
from mgt_fast.train.batches import (
    DataError,
    require_part,
    require_two,
    select_parts,
    target_values,
)
from mgt_fast.train.config import DataConfig


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twenty rock salts of different size: 10 train, 4 val, 3 test, 3 in no part; "gap" misses two."""
    n = 20
    gap = np.arange(n, dtype=float)
    gap[[2, 11]] = np.nan
    path = tmp_path_factory.mktemp("data") / "salts"
    with DatasetWriter(path, {"gap": Target("eV", "a test")}) as writer:
        writer.write(
            record_batch(
                ids=[f"salt-{i}" for i in range(n)],
                numbers=[np.array([11, 17])] * n,
                frac_coords=[np.array([[0, 0, 0], [0.5, 0.5, 0.5]])] * n,
                cell=np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) * np.linspace(2.5, 3.5, n)[:, None, None],
                pbc=np.ones((n, 3), bool),
                split=["train"] * 10 + ["val"] * 4 + ["test"] * 3 + [""] * 3,
                targets={"gap": gap},
            )
        )
    return CrystalDataset.open(path)


def test_own_parts(dataset):
    parts = select_parts(dataset, DataConfig(), seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 10, "val": 4, "test": 3, "": 3}
    assert parts["val"].tolist() == [10, 11, 12, 13]


def test_unusable_crystals_are_left_out(dataset):
    known = ~np.isnan(target_values(dataset, "gap"))
    parts = select_parts(dataset, DataConfig(), seed=0, usable=known)
    assert 2 not in parts["train"]
    assert parts["val"].tolist() == [10, 12, 13]


def test_random_parts_are_disjoint_and_complete(dataset):
    data = DataConfig(fractions=(0.7, 0.2, 0.1))
    parts = select_parts(dataset, data, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 14, "val": 4, "test": 2}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(20))
    again, other = select_parts(dataset, data, seed=3), select_parts(dataset, data, seed=4)
    assert parts["test"].tolist() == again["test"].tolist()
    assert parts["train"].tolist() != other["train"].tolist()


def test_limit_keeps_a_random_choice(dataset):
    parts = select_parts(dataset, DataConfig(limit=4), seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 4, "val": 4, "test": 3, "": 3}
    assert set(parts["train"]) <= set(range(10))
    assert parts["train"].tolist() != [0, 1, 2, 3]


@pytest.mark.parametrize("form", ["json", "csv"])
def test_parts_of_a_file_replace_the_dataset_s(dataset, tmp_path, form):
    named = {"train": ["salt-17", "salt-0"], "val": ["salt-3"], "test": ["salt-12", "salt-11"]}
    file = tmp_path / f"split.{form}"
    rows = [f"{name},{part}" for part, names in named.items() for name in names]
    file.write_text(json.dumps(named) if form == "json" else "\n".join(["id,split", *rows]))
    known = ~np.isnan(target_values(dataset, "gap"))
    parts = select_parts(dataset, DataConfig(split_file=file), seed=0, usable=known)
    assert {name: part.tolist() for name, part in parts.items() if name} == {
        "train": [0, 17],
        "val": [3],
        "test": [12],
    }
    assert len(parts[""]) == 14


def test_a_file_that_names_other_crystals_is_refused(dataset, tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["salt-1", "pepper", "sugar"]}))
    with pytest.raises(DataError, match=r"2 of its 3 ids are not in the dataset .*\(pepper, sugar\)"):
        select_parts(dataset, DataConfig(split_file=file), seed=0)


def test_unknown_target_lists_the_known(dataset):
    with pytest.raises(DataError, match=r"no target 'bandgap'; available: gap"):
        target_values(dataset, "bandgap")


def test_empty_part_says_what_there_is(dataset):
    parts = select_parts(dataset, DataConfig(), seed=0)
    with pytest.raises(DataError, match=r"no crystal to learn from: part 'training' is empty .*train: 10"):
        require_part(parts, "training", "learn from")


def test_one_crystal_is_too_few_to_learn_from(dataset):
    require_two(dataset, np.array([3, 4]))
    with pytest.raises(DataError, match=r"the only crystal to learn from is salt-3; .*at least 2"):
        require_two(dataset, np.array([3]))
