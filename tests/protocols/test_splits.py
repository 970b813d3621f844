"""The rules of the official splits, against the official ids where these lie beside the repository."""

import itertools
import json

import pytest

from mgt_fast.data.readers.inputs import read_text
from mgt_fast.protocols.recipe import find_recipe
from mgt_fast.protocols.splits import Parts, fraction_sizes, hold_out, k_folds, shuffled

NAMES = [f"crystal-{i}" for i in range(103)]

# Crystals of dft_3d (18 August 2021) that have the target: the ids tell these numbers, for only with them the
# rule puts the crystals of all three files into one order.
JARVIS = {
    "formation_energy_peratom": ("jarvis_formation_energy", 55723),
    "ehull": ("jarvis_e_hull", 55371),
    "mbj_bandgap": ("jarvis_mbj_band_gap", 18172),
}


def official(path):
    return json.loads(read_text(path))


def ranks_in_file(shared_data, target, count=None):
    """Where the rule says that crystals stand among those with the target, for parts that are whole.

    The official ids are the keys of an object: of a crystal that stands in a part twice one is lost, and the
    places of the others in this part are unknown.
    """
    name, official_count = JARVIS[target]
    recipe = find_recipe(name)
    parts = official(shared_data / "splits" / f"dft_3d_{target}.json.zip")
    rule = shuffled(range(count or official_count), recipe.sizes, recipe.split.seed)
    ranks = {}
    for part in ("val", "test"):
        ids, places = list(parts[part]), getattr(rule, part)
        if len(ids) == len(places):
            ranks |= dict(zip(ids, places, strict=True))
    return ranks


def disorder(one, other):
    """Number of neighbours in the one order that stand the other way round in the other."""
    common = sorted(one.keys() & other.keys(), key=one.get)
    assert len(common) > 300
    return sum(other[b] < other[a] for a, b in itertools.pairwise(common))


def test_the_jarvis_rule_puts_the_crystals_of_every_target_into_one_order(shared_data):
    ranks = [ranks_in_file(shared_data, target) for target in JARVIS]
    for one, other in itertools.combinations(ranks, 2):
        assert disorder(one, other) == 0
        assert (
            min(one[name] - other[name] for name in one.keys() & other.keys()) >= 0
        )  # fewer have the latter


def test_only_the_right_number_of_crystals_does_so(shared_data):
    one = ranks_in_file(shared_data, "formation_energy_peratom")
    assert disorder(one, ranks_in_file(shared_data, "ehull", count=55370)) > 1000


@pytest.mark.parametrize("name", ["jdft2d", "phonons"])
def test_folds_are_those_of_matbench(shared_data, name):
    folds = json.loads((shared_data / "matbench" / "folds.json").read_text())["splits"][f"matbench_{name}"]
    split = find_recipe(f"matbench_{name}").split
    ids = sorted({i for part in folds["fold_0"].values() for i in part})
    found = k_folds(ids, split.folds, split.random_state)
    assert len(found) == len(folds)
    for number, (train, test) in enumerate(found):
        assert train == folds[f"fold_{number}"]["train"]
        assert test == folds[f"fold_{number}"]["test"]


@pytest.mark.parametrize("name", ["megnet_e_form", "megnet_gappbe"])
def test_megnet_targets_have_the_same_parts(shared_data, name):
    parts = official(shared_data / "splits" / f"{name}.json.zip")
    assert tuple(map(len, parts.values())) == find_recipe("mp_band_gap").sizes
    reference = official(shared_data / "splits" / "megnet_e_form.json.zip")
    assert {part: set(ids) for part, ids in parts.items()} == {p: set(i) for p, i in reference.items()}


def test_shuffled_takes_val_and_test_from_the_end():
    parts = shuffled(NAMES, (80, 10, 11))
    assert parts.sizes == (80, 10, 11)
    whole = shuffled(NAMES, (82, 10, 11))
    assert (whole.train[:80], whole.val, whole.test) == (parts.train, parts.val, parts.test)
    assert sorted(whole) == sorted(NAMES)
    assert shuffled(NAMES, (82, 10, 11), seed=1).test != whole.test
    with pytest.raises(ValueError, match="103 crystals have the target, and the split needs 104"):
        shuffled(NAMES, (84, 10, 10))


def test_fractions_leave_the_rest_to_train():
    assert fraction_sizes(1346, (0.8, 0.1, 0.1)) == (1078, 134, 134)
    assert fraction_sizes(10, (0.8, 0.1, 0.1)) == (8, 1, 1)


def test_hold_out_divides_the_training_crystals():
    train, val = hold_out(NAMES, 0.1, seed=5)
    assert len(val) == 10
    assert sorted([*train, *val]) == sorted(NAMES)
    assert hold_out(NAMES, 0.1, seed=5) == (train, val)
    assert hold_out(NAMES, 0.1, seed=6)[1] != val
    assert len(hold_out(NAMES[:3], 0.1, seed=0)[1]) == 1


def test_a_crystal_named_twice_stays_where_it_is_not_learned_from():
    parts, repeated = Parts(["a", "b", "c", "a"], ["b", "d"], ["e", "c", "b"]).once()
    assert parts == Parts(["a"], ["d"], ["e", "c", "b"])
    assert repeated == ["a", "b", "c"]
    assert Parts(["a"], ["b"], ["c"]).once() == (Parts(["a"], ["b"], ["c"]), [])
