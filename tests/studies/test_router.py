import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import Crystal, described_anew
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from mgt_fast.checkpoint import CheckpointMeta, save_checkpoint
from mgt_fast.cli import app
from mgt_fast.config import MGTConfig
from mgt_fast.data import CrystalDataset, DatasetWriter, Target
from mgt_fast.data.manifest import hash_file
from mgt_fast.data.store import record_batch
from mgt_fast.inference import predict_dataset
from mgt_fast.model import MGT
from mgt_fast.studies import router
from mgt_fast.studies.correlation import Correlation, kruskal_wallis, spearman
from mgt_fast.studies.descriptors import DESCRIPTORS, cell_shape, describe, environment_shape, symmetries
from mgt_fast.studies.router_report import consistency, report_on
from mgt_fast.train.setup import manifest_digest

ROCK_SALT = Crystal(
    np.array([11] * 4 + [17] * 4),
    np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]] * 2) + np.repeat([0, 0.5], 4)[:, None],
    5.64 * np.eye(3),
)
LAYERED = Crystal(np.array([22, 8]), np.array([[0, 0, 0], [0.5, 0.5, 0.3]]), np.diag([3.0, 3.1, 8.0]))
ARGON = Crystal(np.array([18]), np.zeros((1, 3)), 5.3 / 2 * (np.ones((3, 3)) - np.eye(3)))


def dataset_of(path, crystals, target=None, pbc=None):
    n = len(crystals)
    with DatasetWriter(path, {"gap": Target("eV")} if target is not None else {}) as writer:
        writer.write(
            record_batch(
                ids=[f"crystal-{i}" for i in range(n)],
                numbers=[crystal.numbers for crystal in crystals],
                frac_coords=[crystal.frac for crystal in crystals],
                cell=np.stack([crystal.cell for crystal in crystals]),
                pbc=np.ones((n, 3), bool) if pbc is None else pbc,
                split=["test" if i % 2 else "train" for i in range(n)],
                targets={} if target is None else {"gap": target},
            )
        )
    return CrystalDataset.open(path)


def network(path, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"channels": 8, "num_scalars": 4, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 4}
    model = MGT(MGTConfig(**sizes | changes))
    save_checkpoint(path, model, CheckpointMeta(model=model.config, max_neighbors=6, target="gap", unit="eV"))
    return path


def variants(n, seed=0):
    """Crystals that differ in cell and composition."""
    rng = np.random.default_rng(seed)
    return [
        Crystal(
            rng.choice([3, 8, 14, 22, 29, 56], 2),
            LAYERED.frac,
            np.diag(rng.uniform(3, 7, 3)),
        )
        for _ in range(n)
    ]


def invoke(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + repr(result.exception)
    return result


def test_cell_shape():
    cells = np.stack([2 * np.eye(3), np.diag([1, 1, np.e]), ARGON.cell])
    shape = cell_shape(cells)
    np.testing.assert_allclose(shape["cell_ratio"], [1, np.e, 1])
    np.testing.assert_allclose(shape["cell_spread"], [0, np.sqrt(2) / 3, 0], atol=1e-12)
    np.testing.assert_allclose(shape["cell_metric_ratio"], [1, np.e, 2])


def test_environment_shape():
    octahedron = np.concatenate((np.eye(3), -np.eye(3)))
    line = np.array([[0, 0, 1.0], [0, 0, -1]])
    lone = np.array([[0, 3.0, 0]])
    vectors = np.concatenate((octahedron, line, lone))
    shape = environment_shape(vectors, np.repeat([0, 1, 2], [6, 2, 1]), 3)
    np.testing.assert_allclose(shape["local_anisotropy"], [0, 1, 1], atol=1e-12)
    np.testing.assert_allclose(shape["local_polarity"], [0, 0, 1], atol=1e-12)


def test_descriptors_of_rock_salt(tmp_path):
    found = {k: v[0] for k, v in describe(dataset_of(tmp_path / "d", [ROCK_SALT]), np.array([0]), 6).items()}
    assert set(found) == set(DESCRIPTORS)
    expected = {
        "num_atoms": 8,
        "density": 2.164,  # as measured
        "volume_per_atom": 5.64**3 / 8,
        "cell_ratio": 1,
        "local_anisotropy": 0,
        "local_polarity": 0,
        "mean_atomic_number": 14,
        "mean_electronegativity": (0.93 + 3.16) / 2,
        "electronegativity_spread": (3.16 - 0.93) / 2,
        "num_elements": 2,
        "metal_fraction": 0.5,
        "transition_metal_fraction": 0,
        "oxygen_fraction": 0,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-3, abs=1e-9), name


def test_shape_does_not_depend_on_the_description(tmp_path):
    rng = np.random.default_rng(1)
    crystals = [LAYERED, described_anew(LAYERED, rng), described_anew(LAYERED, rng)]
    found = describe(dataset_of(tmp_path / "d", crystals), np.arange(3), 6)
    for name, values in found.items():
        np.testing.assert_allclose(values, values[0], rtol=1e-9, atol=1e-12, err_msg=name)
    assert found["local_anisotropy"][0] > 0.1
    assert found["oxygen_fraction"][0] == found["transition_metal_fraction"][0] == 0.5


def test_an_element_without_electronegativity_is_not_known(tmp_path):
    found = describe(dataset_of(tmp_path / "d", [ARGON]), np.array([0]), 6)
    assert np.isnan(found["mean_electronegativity"][0])
    assert found["density"][0] == pytest.approx(39.95 / 6.02214e23 / (5.3**3 / 4 * 1e-24), rel=1e-3)


def test_symmetry_is_found_or_said_why_not(tmp_path):
    pbc = np.array([[True] * 3, [True] * 3, [True, True, False]])
    found = symmetries(dataset_of(tmp_path / "d", [ROCK_SALT, LAYERED, LAYERED], pbc=pbc), np.arange(3))
    assert [(one.system, one.space_group) for one in found] == [
        ("cubic", 225),
        ("orthorhombic", 25),
        (None, None),
    ]
    assert [one.problem for one in found] == ["", "", "not periodic in three directions"]


def test_spearman():
    x = np.arange(20.0)
    rising = spearman(x, np.exp(x))
    assert (rising.rho, rising.low, rising.high, rising.count) == (1, 1, 1, 20)
    assert spearman(x, -x).rho == -1
    assert np.isnan(spearman(x, np.ones(20)).rho)
    assert not spearman(x, np.ones(20)).resolved
    assert np.isnan(spearman(x[:4], x[:4]).rho)
    y = np.where(x < 3, np.nan, np.random.default_rng(0).normal(size=20))
    known = spearman(x, y)
    assert known.count == 17
    assert known.rho == pytest.approx(stats.spearmanr(x[3:], y[3:]).statistic)


def test_spearmans_interval_holds_the_true_value_as_often_as_it_says():
    rng = np.random.default_rng(0)
    r = 0.6
    true = 6 / np.pi * np.arcsin(r / 2)  # of two normal columns
    draws = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], (400, 60))
    found = [spearman(draw[:, 0], draw[:, 1]) for draw in draws]
    assert 0.92 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.98


def test_kruskal_wallis():
    rng = np.random.default_rng(0)
    groups = [rng.normal(size=30), rng.normal(size=30) + 3, np.full(4, 100.0)]
    found = kruskal_wallis(groups)
    expected = stats.kruskal(*groups[:2])
    assert found.p_value == expected.pvalue < 1e-6
    assert found.effect == pytest.approx((expected.statistic - 1) / 58)
    assert np.isnan(kruskal_wallis(groups[1:]).p_value)
    assert np.isnan(kruskal_wallis([np.ones(9), np.ones(9)]).p_value)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Analysis of shares that follow the density, and of shares that follow nothing."""
    dataset = dataset_of(tmp_path_factory.mktemp("planted") / "d", variants(80), np.zeros(80))
    indices, rng = np.arange(80), np.random.default_rng(1)
    density = describe(dataset, indices, 6)["density"]
    planted = 1 / (1 + np.exp(-(density - density.mean()) + rng.normal(0, 0.1, 80)))
    shares = [
        router.Shares(name, "gap", "eV", indices, so3, np.zeros(80), rng.normal(size=80), {})
        for name, so3 in (("planted", planted), ("random", rng.uniform(size=80)), ("negated", 1 - planted))
    ]
    return shares, router.analyse(shares, dataset, 6)


def test_what_a_share_goes_with_is_found(found):
    planted, random, _ = found[1]
    assert planted.correlations["density"].rho > 0.9
    assert planted.correlations["density"].resolved
    assert [name for name, one in random.correlations.items() if one.resolved] == []
    assert "absolute_error" in random.correlations
    assert (
        np.isnan(planted.correlations["num_elements"].p_value)
        or planted.correlations["num_elements"].count == 80
    )


def test_p_values_are_corrected_for_all_tests_of_a_network(found):
    planted = found[1][0]
    raw = spearman(planted.values["density"], planted.shares.so3)
    tests = sum(np.isfinite(one.p_value) for one in planted.correlations.values())
    tests += np.isfinite(planted.systems.p_value)
    assert planted.correlations["density"].p_value == pytest.approx(raw.p_value * tests)


def test_agreement_of_networks(found):
    pairs = {(pair.first, pair.second): pair for pair in router.agreements(found[0])}
    assert pairs["planted", "negated"].correlation.rho == -1
    assert not pairs["planted", "random"].correlation.resolved
    assert all(pair.same_target for pair in pairs.values())


def test_networks_of_one_target_are_set_beside_one_another(found):
    planted, random, negated = (analysis.correlations["density"] for analysis in found[1])
    assert consistency([planted, negated]) == consistency([random, planted, negated]) == "contradictory"
    assert consistency([planted, planted]) == "the same"
    assert consistency([planted, random]) == "not resolved by all"
    report = report_on(found[1], [], [str(i) for i in range(80)], {}, {})
    (claim,) = (claim for claim in report.claims if claim.startswith("3 networks of gap"))
    assert "density" in claim.partition("In opposite directions")[2]
    assert not any(claim.startswith("2 networks") for claim in report.claims)


def test_command_writes_what_the_networks_predict(tmp_path):
    crystals = variants(24)
    dataset = dataset_of(tmp_path / "data", crystals, np.linspace(0, 1, 24))
    models = [network(tmp_path / f"{name}.safetensors", seed) for name, seed in (("a", 1), ("b", 2))]
    result = invoke(
        *("router", "-m", models[0], "-m", models[1], "-d", tmp_path / "data", "--split", "test"),
        *("-o", tmp_path / "out"),
    )
    assert "Do networks divide the same crystals alike?" in result.output
    with (tmp_path / "out" / "router.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24
    for name, path in zip("ab", models, strict=True):
        table, _ = predict_dataset(MGT.load(path), dataset)
        expected = dict(zip(table.ids, table.contributions, strict=True))
        own = [row for row in rows if row["model"] == name]
        assert [row["id"] for row in own] == [f"crystal-{i}" for i in range(1, 24, 2)]
        for row in own:
            shares = float(row["se3_contribution"]), float(row["so3_contribution"])
            np.testing.assert_allclose(shares, expected[row["id"]], atol=1e-5)
    report = json.loads((tmp_path / "out" / "router.json").read_text())
    assert set(report["details"]["models"]) == {"a", "b"}
    assert report["environment"]["datasets"]["crystals"]["crystals"] == 24
    assert (tmp_path / "out" / "router.md").read_text().startswith("# Contributions of the views")
    assert (tmp_path / "out" / "router.png").stat().st_size > 10_000


def test_networks_that_learned_from_a_split_file_need_it(tmp_path):
    dataset = dataset_of(tmp_path / "data", variants(12), np.linspace(0, 1, 12))
    path = network(tmp_path / "a.safetensors")
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"train": ["crystal-0"], "test": [f"crystal-{i}" for i in range(2, 9)]}))
    model = MGT.load(path)
    meta = replace(model.meta, dataset=manifest_digest(dataset), split=hash_file(file))
    save_checkpoint(path, model, meta)
    arguments = ("router", "-m", path, "-d", tmp_path / "data", "-o", tmp_path / "out")
    assert "(--split-file)" in invoke(*arguments, status=1).output
    invoke(*arguments, "--split-file", file)
    with (tmp_path / "out" / "router.csv").open(newline="") as table:
        assert [row["id"] for row in csv.DictReader(table)] == [f"crystal-{i}" for i in range(2, 9)]


def test_crystals_without_a_system_are_listed(tmp_path):
    pbc = np.ones((12, 3), bool)
    pbc[5, 2] = False
    dataset_of(tmp_path / "data", variants(12), np.linspace(0, 1, 12), pbc)
    model = network(tmp_path / "a.safetensors")
    report = router.router_study([model], tmp_path / "out", Console(quiet=True), tmp_path / "data")
    assert report.details["no_crystal_system"] == {"crystal-5": "not periodic in three directions"}
    assert any("crystal-5" in warning for warning in report.warnings)
    assert len(report.records) == 6


def test_a_stagnant_router_is_warned_of(tmp_path):
    dataset_of(tmp_path / "data", variants(12), np.linspace(0, 1, 12))
    model = MGT.load(network(tmp_path / "a.safetensors"))
    with torch.no_grad():
        model.mixture_of_experts.projection.weight[0, 0] = 0
    save_checkpoint(tmp_path / "a.safetensors", model, model.meta)
    report = router.router_study(
        [tmp_path / "a.safetensors"], tmp_path / "out", Console(quiet=True), tmp_path / "data"
    )
    assert any("takes the SO(3) view alone" in warning for warning in report.warnings)
    assert {one.rho for one in _finite(report)} == set()


def _finite(report):
    correlations = report.details["models"]["a"]["correlations"].values()
    return [one for one in correlations if isinstance(one, Correlation) and np.isfinite(one.rho)]


def test_a_dataset_without_the_target_is_looked_at_as_a_whole(tmp_path):
    dataset_of(tmp_path / "data", variants(8))
    model = network(tmp_path / "a.safetensors")
    arguments = ("router", "-m", model, "-d", tmp_path / "data", "-o", tmp_path / "out", "--split")
    assert "(--split all)" in invoke(*arguments, "test", status=1).output
    invoke(*arguments, "all")
    assert "target: its value" not in (tmp_path / "out" / "router.md").read_text()


def test_faults_are_named(tmp_path):
    dataset_of(tmp_path / "data", variants(8), np.linspace(0, 1, 8))
    model = network(tmp_path / "a.safetensors")
    data = ("-d", tmp_path / "data", "-o", tmp_path / "out")
    assert "no model was given" in invoke("router", *data, status=1).output
    assert "given twice" in invoke("router", "-m", model, "-m", model, *data, status=1).output
    one_view = network(tmp_path / "b.safetensors", views="se3")
    assert "has no router" in invoke("router", "-m", one_view, *data, status=1).output
    assert "evaluate" in invoke("router", "-m", model, "--split", "val", *data, status=1).output


def test_networks_are_named_by_what_tells_them_apart(tmp_path):
    names = router.name_models([tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "y" / "other"])
    assert list(names) == ["x/run", "y/run", "y/other"]
    assert list(router.name_models([tmp_path / "x" / "last.safetensors"])) == ["last"]
