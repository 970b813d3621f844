"""What is said of a run: each notice when it is due, and none of a run that is well."""

from dataclasses import replace

import made_runs
import numpy as np
import pytest

from mgt_fast.report.notices import notices
from mgt_fast.report.record import read_run
from mgt_fast.train.config import FinetuneConfig, load_config


@pytest.fixture(scope="module")
def run(finished):
    """A run that is well: its best epoch is not the last, and it has enough crystals."""
    found = read_run(finished)
    epochs = made_runs.epochs_of(6)
    epochs[5]["val_mae"] = 1.01 * epochs[4]["val_mae"]
    scored = found.predictions
    many = {name: np.tile(getattr(scored, name), 10) for name in ("ids", "part", "reference", "prediction")}
    results = {
        **{part: scores_of(found.results[part], 10) for part in ("val", "test")},
        "best_epoch": 5,
        "epochs": 6,
    }
    return replace(
        found, epochs=epochs, results=results, predictions=replace(scored, contributions=None, **many)
    )


def scores_of(figures, times):
    return {name: {**values, "count": times * values["count"]} for name, values in figures.items()}


def said(run, **changes):
    changed = replace(run, **changes)
    return [f"{notice.kind}: {notice.text}" for notice in notices(changed)]


def configured(run, *settings):
    changes = [*made_runs.SETTINGS, "optim.epochs=6", "optim.warmup_epochs=0.5", *settings]
    return load_config(FinetuneConfig, None, changes)


def test_nothing_is_said_of_a_run_that_is_well(run):
    assert said(run) == []


def test_a_run_that_has_not_ended(run):
    (text,) = said(run, results=None, predictions=None, epochs=run.epochs[:5])
    assert text.startswith("note: ")
    assert "has not ended: 5 of 6 epochs" in text


def test_early_stopping(run):
    config = configured(run, "optim.epochs=9", "early_stopping.patience=3")
    (text,) = said(run, config=config)
    assert "Stopped early after 6 of 9 epochs: val_mae had not fallen for 3 epochs" in text


def test_the_last_epoch_as_the_best(run):
    (text,) = said(run, results=run.results | {"best_epoch": 6})
    assert "The last epoch has the best val_mae" in text


def test_overfitting(run):
    epochs = [*run.epochs[:5], run.epochs[5] | {"val_mae": 1.2 * run.epochs[4]["val_mae"]}]
    (text,) = said(run, epochs=epochs)
    assert text.startswith("warning: val_mae rose from")
    assert "in epoch 5" in text


def test_a_metric_that_is_not_finite(run):
    epochs = [run.epochs[0] | {"train_loss": float("inf")}, *run.epochs[1:]]
    assert said(run, epochs=epochs) == [
        "warning: train_loss is not finite in epoch 1; lower optim.lr or set optim.grad_clip."
    ]


def test_a_spike_of_the_gradient(run):
    high = run.steps.high["norm"].copy()
    high[17] = 1e4
    steps = replace(run.steps, high={**run.steps.high, "norm": high})
    (text,) = said(run, steps=steps)
    assert "The gradient's norm reached 1e+04 near step 18" in text
    assert said(run, steps=steps, config=configured(run, "optim.grad_clip=1")) == []


def test_a_stagnating_router(run):
    even = {"val_so3_share": 0.5, "val_so3_share_std": 0.001}
    (text,) = said(run, epochs=[record | even for record in run.epochs])
    assert text.startswith("warning: epoch 5: the router stagnates")


def test_no_better_than_trivial(run):
    figures = run.results["test"]
    worse = {**figures, "mean": figures["model"] | {"mae": 0.9 * figures["model"]["mae"]}}
    (text,) = said(run, results=run.results | {"test": worse})
    assert text.startswith("warning: On test the network (MAE")
    assert "eV/atom) is no better than always predicting" in text


def test_predictions_of_another_evaluation(run):
    other = replace(run.predictions, prediction=run.predictions.prediction + 1)
    texts = said(run, predictions=other)
    assert len(texts) == 2
    assert all("is not the table that results.json was made of" in text for text in texts)


def test_predictions_that_are_not_finite(run):
    prediction = run.predictions.prediction.copy()
    prediction[3] = np.nan
    assert "warning: 1 predictions are not finite." in said(
        run, predictions=replace(run.predictions, prediction=prediction)
    )


def test_few_crystals(finished):
    texts = [notice.text for notice in notices(read_run(finished))]
    assert sum("part has 15 crystals: its MAE has a standard error of" in text for text in texts) == 2
