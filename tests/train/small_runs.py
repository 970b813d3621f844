"""Whole runs of a small network on a few of the bundled crystals: what they leave, and how they die."""

import io
import json
import os
import random
import re
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faults import watched
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load

from mgt_fast.model import MGT
from mgt_fast.train import finetune, pretrain
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.feed import GraphSource
from mgt_fast.train.loop import Fit
from mgt_fast.train.runlog import RunLog
from mgt_fast.train.step import TrainingStep

SETTINGS = [
    *("model.channels=8", "model.num_scalars=4", "model.num_vectors=2", "model.num_blocks=1"),
    *("model.expert_hidden=4", "model.dropout=0.2", "data.limit=12", "data.max_neighbors=6"),
    *("optim.epochs=2", "optim.warmup_epochs=0.5", "optim.lr=1e-3", "checkpoint.every_steps=2"),
    *("device=cpu", "backend=torch", "threads=1"),
]
BATCH = {"pretrain": 8, "finetune": 4}  # three batches an epoch
COMMANDS = tuple(BATCH)
STEPS = 6
KINDS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def overrides(command, *changes):
    return [*SETTINGS, f"optim.batch_size={BATCH[command]}", *changes]


def arguments(command, folder, *changes):
    """Arguments of the command line."""
    sets = [part for change in overrides(command, *changes) for part in ("--set", change)]
    return [command, "--output", str(folder), *sets]


def run(command, folder, *changes, **options):
    """Run a command as it stands in this process; return what it says."""
    function = {"pretrain": pretrain.pretrain, "finetune": finetune.finetune}[command]
    said = io.StringIO()
    function(
        load_config(KINDS[command], None, overrides(command, *changes)),
        folder,
        Console(file=said, width=1000),
        **options,
    )
    return said.getvalue()


def remains(folder):
    """Return what a run left in its folder, file by file: bytes, or the contents without times."""
    return {
        _plain(str(path.relative_to(folder))): _contents(path)
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def _plain(text):
    """A state saved twice may have either of two names."""
    return re.sub(r"(step-\d+)\.1", r"\1", text)


def _contents(path):
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in data.splitlines()]
    if path.name == "state.json":
        state = json.loads(data)
        del state["sha256"], state["record"]["log"]["metrics.jsonl"]  # whose length depends on times
        state["record"]["course"] = _timeless(state["record"]["course"])
        return state
    if path.name == "latest":
        return _plain(data.decode())
    if path.name == "environment.json":
        changing = ("date", "commit")  # sources may be edited between two runs
        return {name: value for name, value in json.loads(data).items() if name not in changing}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:  # whose metadata come in any order
            metadata, tensors = file.metadata(), load(data)
        return metadata, {name: (str(t.dtype), t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
    return data


def _timeless(record):
    return {name: value for name, value in record.items() if not name.endswith("seconds")}


_PLACES = [
    *((module, "open_dataset", "start") for module in (pretrain, finetune)),
    (pretrain, "pretraining_task", "start"),
    (finetune, "finetuning_task", "start"),
    (RunLog, "__init__", "folder"),
    (GraphSource, "build", "graphs"),
    (MGT, "forward", "forward"),
    (TrainingStep, "_backward", "backward"),
    (TrainingStep, "_reduced", "gradients"),
    (TrainingStep, "update", "update"),
    (pretrain.PretrainTask, "validate", "validation"),
    (finetune.FinetuneTask, "validate", "validation"),
    (Fit, "_end_epoch", "epoch's end"),
    (RunLog, "record", "log"),
    *((module, "save_checkpoint", "best and last") for module in (pretrain, finetune)),
    (Fit, "_save_state", "state"),
    (finetune, "_score", "scores"),
    (finetune, "write_table", "predictions"),
    (RunLog, "write_results", "results"),
]


@contextmanager
def moments(at=None, torn=False, delay=None, only=None):
    """Yield the list of moments that a run passes, by place; at the `at`-th the process is killed.

    They are the begin and end of what the places name, and every operation that changes the disk.

    Args:
        at: number of the fatal moment; None for none.
        torn: kill in the middle of it if it is a write.
        delay: kill so many seconds later, wherever the run is then.
        only: a place; moments of others do not count.
    """
    passed, within = [], ["start"]

    def moment(place, operation=None):
        if only in (None, place):
            passed.append(place)
        if len(passed) - 1 != at or only not in (None, place):
            return False
        if torn and operation == "write":
            return True
        if delay is None:
            die()
        else:
            threading.Timer(delay, die).start()
        return False

    def on_disk(number, operation):
        return die() if operation == "torn" else moment(f"{within[-1]} (disk)", operation)

    def marked(place, function):
        def wrapper(*args, **kwargs):
            moment(place)
            within.append(place)
            try:
                result = function(*args, **kwargs)
            finally:
                within.pop()
            moment(place)
            return result

        return wrapper

    with watched(on_disk), pytest.MonkeyPatch.context() as patch:
        for owner, name, place in _PLACES:
            patch.setattr(owner, name, marked(place, getattr(owner, name)))
        yield passed


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fatal_moments(passed, number, seed):
    """Choose moments at random, of every place about as many: keywords of `moments`."""
    chance = random.Random(seed)
    places = sorted(set(passed))
    chance.shuffle(places)
    for i in range(number):
        at = chance.choice([at for at, place in enumerate(passed) if place == places[i % len(places)]])
        delay = chance.choice((None, chance.uniform(0, 0.05)))
        yield {"at": at, "torn": chance.random() < 0.5, "delay": delay}


def run_until(moment, command, folder, *changes, **options):
    """Run a command in this process, which dies at a moment; if the moment never comes, return "ended"."""
    with moments(**moment) as passed:
        run(command, folder, *changes, **options)
    if len(passed) > moment["at"]:
        time.sleep(60)  # the delay is not over
    return "ended"


@contextmanager
def double_precision():
    """Let networks, graphs and losses be in float64, so that only errors show and no rounding."""
    make, build = MGT.__init__, GraphSource.build

    def make_double(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.double()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MGT, "__init__", make_double)
        patch.setattr(GraphSource, "build", lambda *args: build(*args).to(dtype=torch.float64))
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield
