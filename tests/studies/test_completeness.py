import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from rich.console import Console
from typer.testing import CliRunner

from mgt_fast.checkpoint import CheckpointMeta, save_checkpoint
from mgt_fast.cli import app
from mgt_fast.config import MGTConfig
from mgt_fast.model import MGT
from mgt_fast.structures import CrystalBatch
from mgt_fast.studies.completeness import (
    DESCRIPTIONS,
    Separation,
    completeness_study,
    describe_anew,
    probe,
    redescribed,
)
from mgt_fast.studies.pairs import PAIRS, Pair, quartz, tetrahedral
from mgt_fast.studies.refinement import distance_labels, pair_distances_separate, refinement_separates

pytestmark = pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING:DeprecationWarning")  # pymatgen's

SAME = StructureMatcher(primitive_cell=True, scale=False, ltol=0.01, stol=0.05, angle_tol=0.5)

# What separates each pair: pair distances, each atom's distances, refinement, SE(3) view, SO(3) view;
# on graphs of 12 and of 25 neighbours.
EXPECTED = {
    "fcc / hcp": ("...E.", "PARES"),
    "diamond / lonsdaleite": ("...E.", "PARES"),
    "zincblende / wurtzite": ("...E.", "PARES"),
    "close-packed 12-layer polytypes": (".....", "..RES"),
    "SiC 12-layer polytypes": (".....", "..R.S"),
    "graphite AB / slipped": (".....", "PARES"),
    "bixbyite metals u / −u": ("...ES", "...ES"),
    "chains {0,3,4,5} / {0,4,5,7} of 8": (".ARES", ".ARES"),
    "chains {0,1,4,10,12,17} / {0,1,8,11,13,17}": (".ARES", ".ARES"),
    "chains S15 / Q15": (".ARES", ".ARES"),
    "rings {0,3,4,5} / {0,4,5,7} of 8": (".ARES", ".ARES"),
    "α-quartz P3₁21 / P3₂21": ("...E.", "...E."),
    "tellurium P3₁21 / P3₂21": ("...E.", "...E."),
}


@pytest.fixture(scope="module")
def findings():
    batch = redescribed(PAIRS)
    found = [finding for count in (12, 25) for finding in probe(PAIRS, batch, count, seeds=(0,))]
    return {(finding.pair.name, finding.max_neighbors): finding for finding in found}


def test_every_pair_has_its_expectation():
    assert [pair.name for pair in PAIRS] == list(EXPECTED)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_pairs_are_distinct_crystals_of_one_composition(pair):
    first, second = pair.build()
    assert first.composition.reduced_formula == second.composition.reduced_formula
    assert first.volume / len(first) == pytest.approx(second.volume / len(second), rel=1e-12)
    assert SAME.fit(first, second) == pair.mirror  # which looks at mirror images as equal
    if pair.mirror:
        groups = [structure.get_space_group_info()[1] for structure in (first, second)]
        assert groups == [152, 154]  # an enantiomorphic pair
    for structure in (first, second):
        assert structure.is_valid(tol=1.1)


@pytest.mark.parametrize("count", [12, 25])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_what_separates_a_pair(findings, pair, count):
    finding = findings[pair.name, count]
    separated = "".join(
        letter if separates else "."
        for letter, separates in zip(
            "PARES",
            [
                *(finding.baselines[name] for name in ("pairs", "atoms", "refinement")),
                *(finding.views[name].verdict == "separated" for name in ("se3", "so3")),
            ],
            strict=True,
        )
    )
    assert separated == EXPECTED[pair.name][count == 25]


def test_rounding_is_far_below_every_separation(findings):
    for finding in findings.values():
        for view in finding.views.values():
            assert view.rounding < 1e-12
            assert view.verdict == "confused" or view.median > 10 * view.threshold


def test_homometric_pairs_have_equal_pair_distances_at_long_range():
    homometric = [pair for pair in PAIRS if "at any range" in pair.why]
    assert len(homometric) == 3
    for pair in homometric:
        crystals = CrystalBatch.from_structures(pair.build())
        assert not pair_distances_separate(crystals, 24.0)


def test_bixbyite_pair_is_beyond_any_network_of_distances():
    (pair,) = (pair for pair in PAIRS if "bixbyite" in pair.name)
    crystals = CrystalBatch.from_structures(pair.build())
    assert not refinement_separates(crystals, 120)


def test_polytypes_have_equal_sequences_of_six_layers():
    (pair,) = (pair for pair in PAIRS if pair.name.startswith("close-packed"))
    counts = []
    for structure in pair.build():
        order = structure.frac_coords[np.argsort(structure.frac_coords[:, 2] % 1)]
        steps = np.round(3 * np.diff(order[:, 0], append=order[0, 0])).astype(int) % 3  # B follows A, or C
        windows = np.stack([np.roll(steps, -k) for k in range(6)], axis=1)
        counts.append([Counter(map(tuple, windows[:, :length].tolist())) for length in (5, 6)])
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] != counts[1][1]


def test_ideal_tetrahedra():
    for stacking in ("ABC", "AB"):
        structure = tetrahedral(stacking)
        for site in structure:
            around = structure.get_neighbors(site, 2.35)
            assert len(around) == 4
            vectors = np.array([near.coords - site.coords for near in around]) / 2.34
            np.testing.assert_allclose(vectors @ vectors.T, (4 * np.eye(4) - 1) / 3, atol=1e-9)


def test_quartz_is_quartz():
    structure = quartz(1)
    bonds = [[near.nn_distance for near in structure.get_neighbors(site, 1.8)] for site in structure[:3]]
    assert [len(lengths) for lengths in bonds] == [4, 4, 4]
    np.testing.assert_allclose(bonds, 1.61, atol=0.01)


def test_the_so3_view_sees_no_handedness_and_the_se3_view_does():
    rng = np.random.default_rng(0)
    chiral = Structure(rng.normal(size=(3, 3)) + 4 * np.eye(3), ["Si", "O", "C"], rng.uniform(size=(3, 3)))
    mirrored = Structure(chiral.lattice.matrix * [1, 1, -1], chiral.species, chiral.frac_coords)
    pair = Pair("chiral", lambda: (chiral, mirrored), "mirror images", "here", mirror=True)
    (finding,) = probe([pair], redescribed([pair]), 12, seeds=(0,))
    assert finding.views["so3"].verdict == "confused"
    assert finding.views["se3"].verdict == "separated"
    assert finding.baselines == {"pairs": False, "atoms": False, "refinement": False}


def test_descriptions_are_of_the_same_crystal():
    rng = np.random.default_rng(0)
    structure = quartz(1)
    described = describe_anew(structure, rng)
    assert SAME.fit(structure, described)
    assert described.get_space_group_info()[1] == structure.get_space_group_info()[1]  # not mirrored
    assert not np.allclose(described.lattice.abc, structure.lattice.abc)
    assert len(redescribed(PAIRS[:2])) == 4 * (1 + DESCRIPTIONS)


def test_verdicts():
    assert Separation((1e-3, 1e-5), 1e-16).verdict == "separated"
    assert Separation((1e-16, 2e-16), 1e-16).verdict == "confused"
    assert Separation((1e-3, 1e-16), 1e-16).verdict == "undecided"
    assert Separation((1e-3,), 1e-4).verdict == "confused"  # descriptions differ as much
    assert Separation((1e-9,), 1e-16).faint
    assert not Separation((1e-5,), 1e-16).faint
    assert not Separation((1e-16,), 1e-16).faint


def test_equal_distances_have_equal_labels():
    labels = distance_labels(np.array([2.0, 1.0, 2.0 + 1e-12, 2.1, 1.0]))
    assert labels.tolist() == [1, 0, 1, 2, 0]


def test_report_holds_models_too(tmp_path):
    torch.manual_seed(0)
    sizes = {"channels": 8, "num_scalars": 4, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 4}
    model = MGT(MGTConfig(**sizes, views="so3"))
    meta = CheckpointMeta(model=model.config, max_neighbors=12, target="gap", unit="eV")
    save_checkpoint(tmp_path / "one_view.safetensors", model, meta)
    pairs = [pair for pair in PAIRS if pair.name in ("fcc / hcp", "chains S15 / Q15")]
    report = completeness_study(
        tmp_path / "out",
        Console(quiet=True),
        [tmp_path / "one_view.safetensors"],
        neighbors=[12],
        seeds=[0],
        pairs=pairs,
    )
    assert "12 neighbours: the SO(3) view confuses 1 of 2 pairs: fcc / hcp" in report.claims
    assert "one_view: equal predictions for 1 of 2 pairs: fcc / hcp" in report.claims
    with (tmp_path / "out" / "completeness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == ["random"] * 2 + ["one_view"] * 2
    assert [row["so3_verdict"] for row in rows] == ["confused", "separated"] * 2
    assert [row["se3_verdict"] for row in rows] == ["separated", "separated", "", ""]
    details = json.loads((tmp_path / "out" / "completeness.json").read_text())["details"]
    assert len(details["findings"][0]["distances"]["se3"]) == 1
    text = (tmp_path / "out" / "completeness.md").read_text()
    assert "one_view: gap, eV" in text
    assert "Edelsbrunner" in text
    assert (tmp_path / "out" / "completeness.png").stat().st_size > 10_000


@pytest.mark.parametrize("option", [("--neighbors", "0"), ("--neighbors", "12,12"), ("--seeds", "a")])
def test_numbers_are_checked(option, tmp_path):
    result = CliRunner().invoke(app, ["completeness", *option, "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert f"{option[0]} {option[1]}: expected different whole numbers" in result.output
    assert not (tmp_path / "out").exists()
