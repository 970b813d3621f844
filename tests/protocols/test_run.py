"""A protocol run from end to end on a few toy crystals, and what is said of its outcome."""

import json
import shlex

import numpy as np
import pytest
from rich.console import Console
from test_cli import invoke
from test_prepare import QUIET, item, recipe
from train.small_runs import SETTINGS

from mgt_fast.protocols.prepare import Prepared, prepare_protocol
from mgt_fast.protocols.recipe import RecipeError, find_recipe
from mgt_fast.protocols.run import Score, report_on, run_protocol, settings
from mgt_fast.studies.trials import Trial, TrialResult
from mgt_fast.train.config import ConfigError, FinetuneConfig

TINY = [text for text in SETTINGS if not text.startswith("data.limit")] + [
    "optim.batch_size=4",
    "optim.epochs=1",
    "checkpoint.every_minutes=60",
]
FOLDS = {"rule": "kfold", "folds": 2, "random_state": 1, "val_fraction": 0.25}
PUBLISHED = [
    {"model": "Peer", "mae": 0.5, "source": "a paper"},
    {"model": "Other", "mae": 50.0, "source": "a paper", "note": "dummy"},
]
TOY = {"split": FOLDS, "published": PUBLISHED, "settings": {"tuned": {"loss": "l1", "optim.lr": 2e-3}}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A prepared protocol of 16 crystals in two folds."""
    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    items = [item(i, float(rng.normal())) for i in range(16)]
    (folder / "toy.json").write_text(json.dumps(items))
    one = recipe(**TOY)
    prepare_protocol(one, folder / "prepared", folder, QUIET, workers=0)
    return one, folder / "prepared"


def run(toy, folder, *changes, console=QUIET, **options):
    one, prepared = toy
    return run_protocol(one, prepared, folder, console, overrides=[*TINY, *changes], **options)


def test_every_fold_and_seed_is_run_once_and_stands_beside_the_published(toy, tmp_path):
    report = run(toy, tmp_path, seeds=[0, 1])
    results = {
        (fold, seed): json.loads(
            (tmp_path / "trials" / f"fold-{fold}-seed-{seed}" / "results.json").read_text()
        )
        for fold in (0, 1)
        for seed in (0, 1)
    }
    maes = {place: found["test"]["model"]["mae"] for place, found in results.items()}
    assert all(found["test"]["model"]["count"] == 8 for found in results.values())
    rows = report.tables[0].rows
    assert [row["model"] for row in rows] == [
        "Peer",
        "Other",
        "mgt-fast, published settings, changed, from scratch",
        "mgt-fast, published settings, changed, from scratch, ensemble",
    ]
    assert 0 < rows[-1]["mae"] <= rows[-2]["mae"]
    assert rows[-2]["mae"] == pytest.approx(np.mean(list(maes.values())))
    written = json.loads((tmp_path / "protocol.json").read_text())
    score = written["details"]["score"]
    assert score["by_seed"]["sd"] == pytest.approx(
        np.std([np.mean([maes[f, s] for f in (0, 1)]) for s in (0, 1)], ddof=1)
    )
    assert score["by_fold"]["count"] == 2
    assert score["crystals"]["count"] == 16
    assert written["settings"]["protocol"] == "toy"
    assert {
        suffix for suffix in ("csv", "md", "png") if (tmp_path / f"protocol.{suffix}").stat().st_size
    } == {
        "csv",
        "md",
        "png",
    }
    # Learned settings are not the published ones here, so nothing is said of the published errors.
    assert any("these are not the published settings: model.channels=8" in text for text in report.warnings)
    said = " ".join(report.warnings)
    assert "threads=1" not in said  # decides nothing
    assert "checkpoint" not in said
    assert len(report.claims) == 1

    before = {path: path.read_bytes() for path in tmp_path.rglob("results.json")}
    again = run(toy, tmp_path, seeds=[0, 1])
    assert again.records == report.records
    assert {path: path.read_bytes() for path in tmp_path.rglob("results.json")} == before
    with pytest.raises(ConfigError, match=r"optim\.epochs"):
        run(toy, tmp_path, "optim.epochs=3", seeds=[0, 1])


def test_one_fold_alone_is_no_score(toy, tmp_path):
    report = run(toy, tmp_path, folds=[1])
    assert [row["fold"] for row in report.records] == [1]
    assert report.records[0]["seed"] == FinetuneConfig().seed
    assert "of 2 folds only 1 ran: the official score is the mean of all" in report.warnings
    with pytest.raises(RecipeError, match="toy has no fold 2; it has 0 to 1"):
        run(toy, tmp_path, folds=[2])


def config_of(toy, *overrides, variant="published", start=None):
    one, prepared = toy
    return settings(one, Prepared.open(prepared, one), variant, overrides, start)


def test_the_published_settings_are_the_defaults_and_variants_change_them(toy):
    prepared = toy[1]
    published = config_of(toy)
    data = {"path": prepared / "dataset", "target": "e", "split_file": prepared / "fold-0.json"}
    expected = FinetuneConfig()
    assert published == expected.model_copy(update={"data": expected.data.model_copy(update=data)})
    tuned = config_of(toy, "optim.lr=1e-4", variant="tuned")
    assert (tuned.loss, tuned.optim.lr) == ("l1", 1e-4)
    with pytest.raises(RecipeError, match="toy has no settings 'best'; choose one of published, tuned"):
        config_of(toy, variant="best")
    with pytest.raises(RecipeError, match=r"data\.target = x: the protocol sets it to e"):
        config_of(toy, "data={target: x}")
    with pytest.raises(ConfigError, match=r"optim\.lrr"):
        config_of(toy, "optim.lrr=1")


def test_a_pretrained_network_gives_sizes_and_weights(toy, tmp_path):
    run(toy, tmp_path / "first", folds=[0])
    start = tmp_path / "first" / "trials" / "fold-0-seed-123"
    config = config_of(toy, start=start)
    assert (config.start, config.model.channels, config.data.max_neighbors) == (start, 8, 6)
    assert config.data.target == "e"


def results_with(tmp_path, errors, fold, seed):
    """A trial's result whose predictions of the test crystals are off by so much."""

    class Result(TrialResult):
        mae = float(np.mean(np.abs(list(errors.values()))))
        differences = errors

    return Result(Trial("x", FinetuneConfig(), factors={"fold": fold, "seed": seed}), tmp_path)


def test_the_score_is_the_mean_of_the_folds_not_of_the_crystals(tmp_path):
    results = [
        results_with(tmp_path, {"a": 1.0, "b": 3.0}, 0, 0),
        results_with(tmp_path, {"a": -2.0, "b": 4.0}, 0, 1),
        results_with(tmp_path, {"c": 8.0}, 1, 0),
        results_with(tmp_path, {"c": 6.0}, 1, 1),
    ]
    score = Score.of(results)
    assert score.mae == pytest.approx((2 + 3 + 8 + 6) / 4)
    assert score.by_fold.mean == pytest.approx(score.mae)
    assert score.by_seed.sd == pytest.approx(np.std([5.0, 4.5], ddof=1))
    assert score.crystals.count == 3
    assert score.crystals.mean == pytest.approx((1.5 + 3.5 + 7) / 3)
    assert score.ensemble == pytest.approx(((0.5 + 3.5) / 2 + 7) / 2)


def test_whole_runs_are_compared_with_the_best_published_figure(toy, tmp_path):
    """Only without changes is a number put beside the published one, and it is called no difference."""
    one, _ = toy
    report = run(toy, tmp_path)
    results = [
        TrialResult(Trial(f"fold-{k}", FinetuneConfig(), factors={"fold": k, "seed": 123}), folder)
        for k, folder in enumerate(sorted((tmp_path / "trials").iterdir()))
    ]
    prepared = Prepared.open(toy[1], one)
    score = Score.of(results)
    unchanged = report_on(one, prepared, config_of(toy), "published", (), results, score)
    assert unchanged.warnings == []
    assert unchanged.tables[0].rows[-1]["mae"] == report.tables[0].rows[-1]["mae"]
    share = abs(score.mae - 0.5) / 0.5
    side = "above" if score.mae > 0.5 else "below"
    assert unchanged.claims[1] == (
        f"that is {share:.1%} {side} the 0.5 published for Peer, which have no spread to test against"
    )


def test_crystals_without_labels_are_not_run(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "toy.json").write_text(json.dumps([item(i, 0.0) for i in range(40)]))
    source = {"files": [{"name": "toy.json"}], "format": "jarvis"}
    unlabelled = recipe(target=None, unit="", split={"rule": "none"}, sources=[source])
    found, summary = prepare_protocol(unlabelled, tmp_path / "toy", raw, QUIET, workers=0)
    assert (summary.stored, found.sizes) == (40, ())
    with pytest.raises(RecipeError, match="has no labels; pretrain on it: mgt-fast pretrain") as error:
        run_protocol(unlabelled, tmp_path / "toy", tmp_path / "out", Console(quiet=True))
    command = shlex.split(str(error.value).partition("mgt-fast ")[2])
    invoke(*command, "-o", tmp_path / "run", *[part for text in TINY for part in ("--set", text)])


def test_the_bundled_protocol_runs_from_the_command_line(tmp_path):
    sets = [part for text in [*TINY, "data.limit=6"] for part in ("--set", text)]
    invoke("protocol", "prepare", "bundled", "-o", tmp_path / "prepared")
    arguments = ("protocol", "run", "bundled", "-d", tmp_path / "prepared", "-o", tmp_path / "run", *sets)
    result = invoke(*arguments, "--seeds", "7")
    assert "at most 6 crystals of each part were used" in result.output
    report = json.loads((tmp_path / "run" / "protocol.json").read_text())
    assert [(row["fold"], row["seed"], row["crystals"]) for row in report["records"]] == [(0, 7, 6)]
    assert report["settings"]["config"]["data"]["path"] is None
    assert "--seeds 7,x: expected whole numbers" in invoke(*arguments, "--seeds", "7,x", status=1).output
    unprepared = invoke("protocol", "run", "bundled", "-d", tmp_path / "none", status=1).output
    assert "mgt-fast protocol prepare bundled -o" in unprepared


@pytest.mark.parametrize("name", ["agra_o", "matbench_jdft2d"])
def test_benchmarks_run_from_their_raw_files(shared_data, tmp_path, name):
    one = find_recipe(name)
    prepare_protocol(one, tmp_path / "prepared", shared_data, QUIET, workers=0)
    overrides = [*TINY, "data.limit=6"]
    report = run_protocol(one, tmp_path / "prepared", tmp_path / "run", QUIET, overrides=overrides, folds=[0])
    assert [row["crystals"] for row in report.records] == [6]
    rows = report.tables[0].rows
    assert {row["model"]: row["mae"] for row in rows[:-1]} == {p.model: p.mae for p in one.published}
    assert rows[-1]["mae"] == report.records[0]["mae"] > 0
