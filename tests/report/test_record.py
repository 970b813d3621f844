"""Reading run folders: damage is named, many steps become few points, the best epoch is the run's own."""

import json

import made_runs
import numpy as np
import pytest

from mgt_fast.report.record import MOST_POINTS, RunFolderError, read_run


@pytest.fixture
def folder(tmp_path):
    folder = made_runs.pretraining(tmp_path / "run")
    (folder / "last.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "metrics.jsonl",
            '{"epoch": 1}\n{"epoch": 2, "val_loss": "low"}\n',
            "metrics.jsonl, line 2 is no record",
        ),
        ("metrics.jsonl", '{"epoch": 1}\n[1]\n', "line 2"),
        ("metrics.jsonl", '{"val_loss": 1.0}\n', "line 1"),
        ("steps.jsonl", '{"step": 1, "epoch": 1, "loss"}\n', "steps.jsonl, line 1"),
        ("steps.jsonl", "[" * 100_000 + "\n", "steps.jsonl, line 1"),
        ("results.json", "[1]", "results.json is damaged"),
        ("results.json", '{"epochs": ', "results.json is damaged"),
        ("environment.json", "\x00", "environment.json is damaged"),
    ],
)
def test_damage_is_named(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(RunFolderError, match=message):
        read_run(folder)


def test_stretches_hold_every_step(folder):
    count = 10 * MOST_POINTS + 1
    records = made_runs.steps_of(count)
    records[7]["norm"] = float("inf")
    records[count - 1]["loss"] = -50.0
    made_runs.write_lines(folder / "steps.jsonl", records)
    steps = read_run(folder).steps
    assert (steps.count, steps.stretch, len(steps.step)) == (count, 11, -(-count // 11))
    loss = np.array([record["loss"] for record in records])
    np.testing.assert_allclose(
        steps.mean["loss"][:-1], loss[: 11 * (len(steps.step) - 1)].reshape(-1, 11).mean(1)
    )
    assert steps.low["loss"].min() == -50
    assert steps.high["loss"].max() == loss.max()
    assert steps.high["norm"][0] == max(r["norm"] for r in records[:11] if np.isfinite(r["norm"]))
    assert steps.step[0] == 6


def test_few_steps_are_kept_one_by_one(folder):
    steps = read_run(folder).steps
    assert (steps.count, steps.stretch) == (10, 1)
    np.testing.assert_array_equal(steps.step, np.arange(1, 11))
    np.testing.assert_array_equal(steps.mean["loss"], [r["loss"] for r in made_runs.steps_of(10)])


def test_the_best_epoch_is_that_of_the_results(folder):
    assert read_run(folder).best["epoch"] == 4
    (folder / "results.json").write_text(json.dumps({"epochs": 4, "best_epoch": 2, "val_loss": 6.5}))
    assert read_run(folder).best["epoch"] == 2
    (folder / "results.json").unlink()
    records = [
        {"epoch": 1, "val_loss": float("nan")},
        {"epoch": 2, "val_loss": 2.0},
        {"epoch": 3, "val_loss": 3.0},
    ]
    made_runs.write_lines(folder / "metrics.jsonl", records)
    assert read_run(folder).best["epoch"] == 2
