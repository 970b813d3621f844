"""The moving average of the weights: what it is, and that a run scores, saves and resumes it."""

import os

import pytest
import torch
from faults import Child
from small_runs import moments, remains, run, run_until

from mgt_fast.checkpoint import load_checkpoint
from mgt_fast.train.average import WeightAverage
from mgt_fast.train.runlog import read_metrics
from mgt_fast.train.runstate import StateStore

EMA = "optim.ema=0.7"


def test_follows_the_formula():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    average = WeightAverage(model, decay=0.3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(1, 6):
        model(torch.randn(4, 3, dtype=torch.float64))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        average.update(step)
        decay = min(0.3, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            real = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value if real else value.clone()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        torch.testing.assert_close(dict(model.state_dict()), expected)
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert not torch.equal(own["0.weight"], expected["0.weight"])


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_run_saves_the_average_and_learns_as_without(command, tmp_path):
    run(command, tmp_path / "averaged", EMA)
    run(command, tmp_path / "plain")
    averaged, plain = (StateStore(tmp_path / name).load()[0] for name in ("averaged", "plain"))
    assert all(torch.equal(averaged[name], value) for name, value in plain.items())
    saved, _ = load_checkpoint(tmp_path / "averaged" / "last.safetensors")
    for name, value in saved.items():
        assert torch.equal(value, averaged[f"average.{name}"])
    assert any(not torch.equal(value, plain[f"model.{name}"]) for name, value in saved.items())
    scores = [read_metrics(tmp_path / name)[-1] for name in ("averaged", "plain")]
    metric = {"pretrain": "val_loss", "finetune": "val_mae"}[command]
    assert scores[0][metric] != scores[1][metric]
    assert scores[0]["train_loss"] == scores[1]["train_loss"]


def test_a_killed_run_goes_on_with_its_average(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    with moments() as passed:
        run("finetune", tmp_path / "whole", EMA)
    moment = {"at": passed.index("epoch's end") + 1}  # between two epochs
    assert Child(lambda: run_until(moment, "finetune", tmp_path / "killed", EMA)).result() is None
    run("finetune", tmp_path / "killed", EMA, resume=True)
    assert remains(tmp_path / "killed") == remains(tmp_path / "whole")
