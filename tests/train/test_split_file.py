"""Runs whose parts a file names, and targets that are learnt as logarithms."""

import csv
import json

import numpy as np
import pytest
from small_runs import run

from mgt_fast.checkpoint import CheckpointError, load_checkpoint, load_model
from mgt_fast.data import CrystalDataset
from mgt_fast.train.batches import DataError
from mgt_fast.train.config import ConfigError, FinetuneConfig, load_config
from mgt_fast.train.evaluate import evaluate

LONG = ["optim.epochs=3", "checkpoint.keep=20"]


@pytest.fixture(scope="module")
def dataset():
    return CrystalDataset.open()


def write_split(path, dataset, first):
    """Name 10, 6 and 5 crystals with a target as train, val and test."""
    labelled = np.flatnonzero(np.isfinite(dataset.targets["formation_energy_per_atom"]))
    names = [dataset.ids[i] for i in labelled[first : first + 21]]
    path.write_text(json.dumps({"train": names[:10], "val": names[10:16], "test": names[16:]}))
    return path


def predicted(folder):
    with (folder / "predictions.csv").open(newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


def test_a_run_learns_and_is_scored_on_the_parts_of_a_file(dataset, tmp_path):
    file = write_split(tmp_path / "split.json", dataset, 100)
    run("finetune", tmp_path / "run", f"data.split_file={file}")
    parts = json.loads(file.read_text())
    rows = predicted(tmp_path / "run")
    assert {name for name, row in rows.items() if row["part"] == "test"} == set(parts["test"])
    assert {name for name, row in rows.items() if row["part"] == "val"} == set(parts["val"])
    model = load_model(tmp_path / "run")
    with pytest.raises(DataError, match=r"parts that a file named .*--split-file"):
        evaluate(model, dataset)
    again = evaluate(model, dataset, split_file=file)
    assert sorted(again.table.ids) == sorted(parts["test"])
    for name, value in zip(again.table.ids, again.table.prediction, strict=True):
        column = next(key for key in rows[name] if key.startswith("prediction"))
        assert value == pytest.approx(float(rows[name][column]), rel=1e-5)
    assert again.caution is None
    other = evaluate(model, dataset, split_file=write_split(tmp_path / "other.json", dataset, 110))
    assert "may hold crystals that it has learned from" in other.caution
    assert len(evaluate(model, dataset, "all").table) == np.isfinite(dataset.targets[model.meta.target]).sum()


def test_a_run_cannot_go_on_with_another_file(dataset, tmp_path):
    file = write_split(tmp_path / "split.json", dataset, 100)
    settings = [f"data.split_file={file}", *LONG]
    run("pretrain", tmp_path / "run", *settings)
    run("pretrain", tmp_path / "run", *settings, resume=True, resume_from=2)
    write_split(file, dataset, 200)
    with pytest.raises(CheckpointError, match=r"the run saw .*split file"):
        run("pretrain", tmp_path / "run", *settings, resume=True, resume_from=2)


def test_random_parts_and_a_file_exclude_each_other():
    with pytest.raises(ConfigError, match=r"fractions = .* and split_file = x\.json both divide"):
        load_config(FinetuneConfig, None, ["data.split_file=x.json", "data.fractions=[0.8, 0.1, 0.1]"])


def test_logarithms_are_learnt_and_predictions_are_in_units(tmp_path):
    settings = ["data.target=log10_K_VRH", "data.transform=log"]
    run("finetune", tmp_path / "run", *settings)
    _, meta = load_checkpoint(tmp_path / "run")
    rows = predicted(tmp_path / "run").values()
    targets, values = (
        np.array([float(next(row[key] for key in row if key.startswith(word))) for row in rows])
        for word in ("reference", "prediction")
    )
    assert meta.target_transform == "log"
    assert abs(np.log(np.median(targets)) - meta.target_mean) < 1  # of logarithms
    assert (values > 0).all()
    assert 0.2 < np.median(values) / np.median(targets) < 5


def test_the_logarithm_of_a_negative_target_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"needs positive targets, but formation_energy_per_atom is not for"):
        run("finetune", tmp_path / "run", "data.transform=log")
