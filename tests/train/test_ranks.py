"""Runs on many ranks: the crystals, steps and figures of one rank; what fails on one, fails on all.

Sums over ranks round otherwise than those over one batch, and AdamW makes much of little: a parameter without
a gradient (a bias before a norm) moves by the rounding alone, and with it running statistics. So
runs are compared in float64, where rounding is far below any error; in float32 the first steps are.
"""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from faults import count
from ranks import run_ranks
from small_runs import BATCH, COMMANDS, STEPS, double_precision, remains, run

from mgt_fast.checkpoint import load_model
from mgt_fast.data import CrystalDataset
from mgt_fast.distributed import RankError, Ranks
from mgt_fast.inference import predict_paths
from mgt_fast.train.evaluate import evaluate
from mgt_fast.train.feed import GraphSource
from mgt_fast.train.finetune import FinetuneTask
from mgt_fast.train.interrupt import RunStoppedError
from mgt_fast.train.loop import NonFiniteLossError
from mgt_fast.train.runlog import read_metrics, read_steps
from mgt_fast.train.runstate import StateStore
from mgt_fast.train.step import TrainingStep

KEEP = ("checkpoint.keep=9",)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Sync nothing here, and nothing in the ranks that are forked from the server."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def recorded(patch):
    """Keep this rank's part of every batch that is trained on: (epoch, number, {place: name})."""
    seen, gradients = [], TrainingStep.gradients

    def record(step, batch, *votes):
        places = np.concatenate([chunk.places.numpy() for chunk in batch.chunks]).tolist()
        seen.append((batch.epoch, batch.number, dict(zip(places, batch.ids, strict=True))))
        return gradients(step, batch, *votes)

    patch.setattr(TrainingStep, "gradients", record)
    return seen


def train(rank, folder, command, changes, double, options):
    """Train on one rank of many; return what it was given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        seen = recorded(patch)
        if double:
            with double_precision():
                run(command, folder, *changes, **options)
        else:
            run(command, folder, *changes, **options)
    return seen


def trained(size, folder, meeting, command, *changes, double=True, **options):
    """Train on so many ranks; return each global batch, put together from what the ranks were given."""
    if size == 1:
        parts = [train(0, folder, command, changes, double, options)]
    else:
        meeting.mkdir()
        parts = run_ranks(train, size, meeting, folder, command, changes, double, options)
    batches = []
    for shares in zip(*parts, strict=True):
        ((epoch, number),) = {share[:2] for share in shares}
        places = {place: name for share in shares for place, name in share[2].items()}
        assert sum(len(share[2]) for share in shares) == len(places)
        assert sorted(places) == list(range(len(places)))
        assert all(share[2] for share in shares)
        batches.append((epoch, number, [places[place] for place in sorted(places)]))
    return batches


def close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert {k: v for k, v in one.items() if "seconds" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "seconds" not in k}, rel=tolerance, abs=tolerance
        )


@pytest.mark.parametrize("command", COMMANDS)
def test_any_number_of_ranks_trains_alike(command, tmp_path):
    """In float64: every step's figures to 1e-9, every epoch's metrics to 1e-7, the weights to 1e-6."""
    sizes = (2, 4) if command == "pretrain" else (2, count(2, 4))
    folders = {size: tmp_path / str(size) for size in (1, *sizes)}
    orders = {
        size: trained(size, folder, tmp_path / f"meet-{size}", command, *KEEP)
        for size, folder in folders.items()
    }
    assert [len(names) for _, _, names in orders[1]] == [BATCH[command]] * STEPS
    for size in sizes:
        assert orders[size] == orders[1]
        close(read_steps(folders[size]), read_steps(folders[1]), 1e-9)
        close(read_metrics(folders[size]), read_metrics(folders[1]), 1e-7)
        weights, expected = (StateStore(folders[n]).load()[0] for n in (size, 1))
        assert weights.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-6, atol=1e-9, msg=name)

    # And from the state of two ranks on any number of them.
    for size in {1, *sizes} - {2}:
        folder = tmp_path / f"2 to {size}"
        shutil.copytree(folders[2], folder)
        order = trained(size, folder, tmp_path / f"resume-{size}", command, *KEEP, resume=True, resume_from=2)
        assert order == orders[1][2:]
        assert read_steps(folder)[:2] == read_steps(folders[2])[:2]
        close(read_steps(folder), read_steps(folders[1]), 1e-9)
        close(read_metrics(folder), read_metrics(folders[1]), 1e-7)


@pytest.mark.parametrize("command", COMMANDS)
def test_ranks_repeat_themselves_bit_for_bit(command, tmp_path):
    """Run twice, and continued from within an epoch; in float32 the first steps are those of one rank."""
    for name in ("once", "twice"):
        trained(2, tmp_path / name, tmp_path / f"meet-{name}", command, *KEEP, double=False)
    expected = remains(tmp_path / "once")
    assert remains(tmp_path / "twice") == expected
    order = trained(
        2, tmp_path / "twice", tmp_path / "meet", command, *KEEP, double=False, resume=True, resume_from=2
    )
    assert [batch[:2] for batch in order] == [(1, 2), (2, 0), (2, 1), (2, 2)]
    assert remains(tmp_path / "twice") == expected
    trained(1, tmp_path / "alone", None, command, *KEEP, double=False)
    close(read_steps(tmp_path / "once")[:2], read_steps(tmp_path / "alone")[:2], 2e-6)


def tables(rank, folder, checkpoint):
    """Evaluate and predict on this rank; return the tables as lists."""
    model, ranks = load_model(checkpoint), Ranks()
    dataset = CrystalDataset.open()
    found = evaluate(model, dataset, "test", batch_size=50, ranks=ranks)
    predicted, rejects = predict_paths(model, [folder / "crystals"], 2, 0, ranks=ranks)
    return (
        found.errors,
        found.table.ids,
        found.table.prediction.tolist(),
        predicted.ids,
        predicted.prediction.tolist(),
        [reject.id for reject in rejects],
    )


def test_evaluation_and_prediction_are_the_same_on_any_number_of_ranks(tmp_path):
    """Five crystals in three batches, of which one has no graph, on more ranks than batches too."""
    from ase import Atoms
    from ase.io import write

    (tmp_path / "crystals").mkdir()
    for i in range(5):
        cell, vacuum = 3 + 0.1 * i, i == 3
        write(
            tmp_path / "crystals" / f"{i}.cif",
            Atoms("NaCl", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0 if vacuum else 0.5]], cell=[cell] * 3),
        )
    (tmp_path / "crystals" / "3.cif").write_text("data_broken")
    run("finetune", tmp_path / "run", "optim.epochs=1")
    checkpoint = tmp_path / "run" / "best.safetensors"
    alone = tables(0, tmp_path, checkpoint)
    assert len(alone[1]) == len(set(alone[1])) == alone[0]["count"] > 200
    assert len(alone[3]) == 4
    assert len(alone[5]) == 1
    for size in (2, 4):
        (meeting := tmp_path / f"meet-{size}").mkdir()
        for one in run_ranks(tables, size, meeting, tmp_path, checkpoint):
            assert one[0] == pytest.approx(alone[0], rel=1e-6)
            assert (one[1], one[3], one[5]) == (alone[1], alone[3], alone[5])
            assert one[2] == pytest.approx(alone[2], rel=1e-6)
            assert one[4] == pytest.approx(alone[4], rel=1e-6)


FAULTS = {}


def fault(function):
    """Register what is patched into a rank's run, by name."""
    FAULTS[function.__name__] = function
    return function


@fault
def unbuildable(patch, rank):
    """A graph that cannot be built, on rank 1 in the second step."""
    build, calls = GraphSource.build, []

    def broken(self, *args):
        calls.append(args)
        if rank == 1 and len(calls) == 2:
            raise ValueError(f"crystal {args[0].ids[0]} is broken")
        return build(self, *args)

    patch.setattr(GraphSource, "build", broken)


@fault
def not_a_number(patch, rank):
    """A target that is not a number, on whichever rank has the crystal, in the fifth step."""
    targets = FinetuneTask.batch_targets
    trained_on = []

    def poisoned(self, crystals):
        scaled = targets(self, crystals)
        poison = np.asarray(self.source.dataset.ids)[crystals] == os.environ["POISON"]
        if poison.any():
            trained_on.append(crystals)
        return scaled.where(torch.from_numpy(~poison | (self.epoch < 2)), torch.nan)

    batches = FinetuneTask.batches

    def counted(self, epoch, first=0):
        self.epoch = epoch
        return batches(self, epoch, first)

    patch.setattr(FinetuneTask, "batches", counted)
    patch.setattr(FinetuneTask, "batch_targets", poisoned)


@fault
def asked_to_stop(patch, rank):
    """A signal that only rank 1 gets, in the third step."""
    update, calls = TrainingStep.update, []

    def signalled(self, lr):
        calls.append(lr)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return update(self, lr)

    patch.setattr(TrainingStep, "update", signalled)


@fault
def unwritable(patch, rank):
    """A disk that the first rank cannot write a state to."""

    def full(self, *args):
        raise OSError(28, "No space left on device")

    if rank == 0:
        patch.setattr(StateStore, "save", full)


@fault
def none(patch, rank):
    """Nothing goes wrong."""


def failing(rank, folder, command, changes, name, environment):
    """Train with a fault; return the error's type, message and signal, or what was said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for key, value in environment.items():
            patch.setenv(key, value)
        FAULTS[name](patch, rank)
        try:
            return "no error", run(command, folder, *changes), None
        except (RankError, ValueError, OSError, NonFiniteLossError, RunStoppedError) as error:
            return type(error).__name__, str(error), getattr(error, "signal", None)


def fails(size, tmp_path, command, name, *changes, **environment):
    return run_ranks(failing, size, tmp_path, tmp_path / "run", command, changes, name, environment)


def test_a_crystal_without_a_graph_is_named_on_every_rank(tmp_path):
    results = fails(4, tmp_path, "pretrain", "unbuildable")
    kind, message, _ = results[1]
    assert kind == "ValueError"
    assert message.startswith("crystal mp-")
    for rank in (0, 2, 3):
        assert results[rank][0] == "RankError"
        assert results[rank][1].startswith("rank 1 of 4 on ")
        assert results[rank][1].endswith(f": {message}")


def test_a_loss_that_is_not_finite_stops_every_rank_at_its_step(tmp_path, monkeypatch):
    order = trained(1, tmp_path / "whole", None, "finetune", double=False)
    epoch, number, names = order[4]
    assert (epoch, number) == (2, 1)
    results = fails(2, tmp_path, "finetune", "not_a_number", POISON=names[0])
    assert results[0] == results[1]
    kind, message, _ = results[0]
    assert kind == "NonFiniteLossError"
    assert message.startswith("epoch 2, step 5: loss nan")
    assert f"not finite even alone: {names[0]}; crystals of the batch: " in message
    assert all(name in message for name in names)
    assert [record["step"] for record in read_steps(tmp_path / "run")] == [1, 2, 3, 4]
    weights = StateStore(tmp_path / "run").load()[0]
    assert StateStore(tmp_path / "run").load()[1]["course"]["step"] == 4
    assert all(value.isfinite().all() for value in weights.values())


def test_a_signal_to_one_rank_stops_all_of_them(tmp_path):
    results = fails(2, tmp_path, "pretrain", "asked_to_stop")
    assert [kind for kind, _, _ in results] == ["RunStoppedError"] * 2
    assert [number for _, _, number in results] == [None, signal.SIGUSR1]
    assert "stopped after step 4 of 6 (epoch 2)" in results[0][1]
    whole = tmp_path / "whole"
    trained(2, whole, tmp_path / "meet-1", "pretrain", double=False)
    trained(2, tmp_path / "run", tmp_path / "meet-2", "pretrain", double=False, resume=True)
    assert remains(tmp_path / "run") == remains(whole)


def test_a_full_disk_stops_every_rank(tmp_path):
    results = fails(2, tmp_path, "pretrain", "unwritable")
    assert [kind for kind, _, _ in results] == ["OSError", "RankError"]
    assert results[1][1].startswith("rank 0 of 2 on ")
    assert all("No space left on device" in message for _, message, _ in results)


def test_ranks_stop_early_together(tmp_path):
    early = ("optim.epochs=6", "early_stopping.patience=2", "early_stopping.min_delta=1e9")
    results = fails(2, tmp_path, "finetune", "none", *early)
    assert [kind for kind, _, _ in results] == ["no error"] * 2
    assert "stopped early" in results[0][1]
    assert results[1][1] == ""  # only the first rank talks
    assert len(read_metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_fewer_crystals_than_ranks_are_refused(command, tmp_path):
    results = fails(4, tmp_path, command, "none", "data.limit=3")
    assert [kind for kind, _, _ in results] == ["ValueError"] * 4
    for _, message, _ in results:
        assert " has 3 crystals; " in message
        assert "and 4 ranks need a crystal each" in message
    assert not (tmp_path / "run").exists()


def test_uneven_batches_count_every_crystal_once(tmp_path):
    """Seven crystals in batches of three, two and two on two ranks: one of them may get a single crystal."""
    changes = ("data.limit=7", "optim.batch_size=3")
    orders = [
        trained(size, tmp_path / str(size), tmp_path / f"meet-{size}", "finetune", *changes)
        for size in (1, 2)
    ]
    assert [len(names) for _, _, names in orders[0]] == [3, 2, 2] * 2
    assert len({name for _, _, names in orders[0][:3] for name in names}) == 7
    assert orders[1] == orders[0]
    close(read_steps(tmp_path / "2"), read_steps(tmp_path / "1"), 1e-9)
    close(read_metrics(tmp_path / "2"), read_metrics(tmp_path / "1"), 1e-9)
