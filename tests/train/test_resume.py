"""A run that was killed or stopped continues bit for bit: weights, optimiser, records, predictions."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import Child, count
from small_runs import COMMANDS, STEPS, arguments, fatal_moments, moments, remains, run, run_until

from mgt_fast.checkpoint import CheckpointError
from mgt_fast.train.config import ConfigError
from mgt_fast.train.runstate import StateStore

LONG = ["optim.epochs=6"]
EARLY = [*LONG, "early_stopping.patience=2", "early_stopping.min_delta=1e9"]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Sync nothing: what these tests kill are processes, not the machine."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def resumed(command, folder, *changes, **options):
    """Continue a run, from its state if there is one; return what it says."""
    had_state = StateStore(folder).exists()
    said = run(command, folder, *changes, resume=True, **options)
    assert ("continuing after step" in said) == had_state
    assert ("starting from the beginning" in said) == (not had_state)
    return said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_continues_bit_for_bit(command, tmp_path):
    """Killed at any moment, and every other time killed once more on its way from there."""
    run(command, tmp_path / "whole")
    expected = remains(tmp_path / "whole")
    assert len(expected["steps.jsonl"]) == STEPS
    with moments() as passed:
        run(command, tmp_path / "again")
    assert remains(tmp_path / "again") == expected
    chance, killed_again = random.Random(1), 0
    number = count(3, 25)
    for i, moment in enumerate(fatal_moments(passed, number, seed=0)):
        folder = tmp_path / str(i)
        place = passed[moment["at"]]
        assert Child(lambda m=moment, f=folder: run_until(m, command, f)).result() is None, place
        if i % 2:
            again = {"at": chance.randrange(len(passed) // 2), "torn": chance.random() < 0.5}
            outcome = Child(lambda m=again, f=folder: run_until(m, command, f, resume=True)).result()
            killed_again += outcome is None
        resumed(command, folder)
        assert remains(folder) == expected, (moment, place)
        shutil.rmtree(folder)
    assert killed_again >= number // 4


def test_early_stopping_counts_on(tmp_path):
    """Without an improvement after the first epoch a run stops after the third, wherever it was killed."""
    with moments() as passed:
        said = run("finetune", tmp_path / "whole", *EARLY)
    assert "stopped early: val_mae has not fallen for 2 epochs" in said
    expected = remains(tmp_path / "whole")
    assert len(expected["metrics.jsonl"]) == 3
    ends = [at for at, place in enumerate(passed) if place in ("epoch's end", "state (disk)")]
    for i in range(0, len(ends), len(ends) // count(2, 12)):
        folder = tmp_path / str(i)
        moment = {"at": ends[-1 - i]}
        assert Child(lambda m=moment, f=folder: run_until(m, "finetune", f, *EARLY)).result() is None
        resumed("finetune", folder, *EARLY)
        assert remains(folder) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_a_finished_run_stays_as_it_is(command, tmp_path):
    run(command, tmp_path)
    before = remains(tmp_path)
    with moments() as passed:
        said = resumed(command, tmp_path)
    assert f"continuing after step {STEPS}, in epoch 3" in said
    assert "update" not in passed
    assert remains(tmp_path) == before


def test_any_kept_state_can_be_continued_from(tmp_path):
    keep = ("checkpoint.keep=9", "checkpoint.every_steps=1")
    run("pretrain", tmp_path, *keep)
    expected = remains(tmp_path)
    assert StateStore(tmp_path).steps() == list(range(STEPS + 1))
    for step in (STEPS, 4, 3, 1, 0):
        said = run("pretrain", tmp_path, *keep, resume=True, resume_from=step)
        assert f"continuing after step {step}, in epoch {1 if step < 3 else 2 if step < 6 else 3}" in said
        assert remains(tmp_path) == expected
    with pytest.raises(CheckpointError, match="step-000000099 is missing; whole: step-000000006"):
        run("pretrain", tmp_path, *keep, resume=True, resume_from=99)
    assert remains(tmp_path) == expected


def test_other_settings_are_refused(tmp_path):
    run("pretrain", tmp_path)
    before = remains(tmp_path)
    match = r"cannot be resumed with other settings: optim\.epochs = 3, the run has 2 \(the learning rate's"
    with pytest.raises(ConfigError, match=match):
        run("pretrain", tmp_path, "optim.epochs=3", resume=True)
    with pytest.raises(FileExistsError, match="already holds"):
        run("pretrain", tmp_path)
    assert remains(tmp_path) == before
    resumed("pretrain", tmp_path, "checkpoint.keep=1", "memory_gib=1")


@pytest.mark.parametrize(
    ("command", "number"), [("pretrain", signal.SIGTERM), ("finetune", signal.SIGUSR1)], ids=COMMANDS
)
def test_a_signal_saves_the_state_and_ends_the_command(command, number, tmp_path):
    """The command line exits as a shell expects, and the run goes on from the step it was in."""
    folder = tmp_path / "stopped"
    mgt_fast = Path(sys.executable).with_name("mgt-fast")
    process = subprocess.Popen(
        [mgt_fast, *arguments(command, folder, *LONG)], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(StateStore(folder).steps()):  # but that of step 0
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    step = StateStore(folder).load()[1]["course"]["step"]
    assert f"stopped after step {step} of 18 (epoch {(step - 1) // 3 + 1}), as asked" in said
    assert "--resume" in said
    expected = tmp_path / "whole"
    run(command, expected, *LONG)
    said = resumed(command, folder, *LONG)
    assert f"continuing after step {step}," in said
    assert remains(folder) == remains(expected)
