import io
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from mgt_fast.checkpoint import CheckpointError
from mgt_fast.durable import replace_file
from mgt_fast.train.config import CheckpointConfig, EarlyStoppingConfig, FinetuneConfig, OptimConfig
from mgt_fast.train.interrupt import RunStoppedError
from mgt_fast.train.loop import Fit, NonFiniteLossError
from mgt_fast.train.runlog import METRICS, STEPS, NullLog, RunLog, read_metrics, read_steps
from mgt_fast.train.runstate import StateStore
from mgt_fast.train.schedule import warmup_cosine
from mgt_fast.train.step import Batch, Chunk, ChunkLoss

OPTIM = OptimConfig(lr=0.3, epochs=6, warmup_epochs=1, batch_size=2, weight_decay=0)


class LineTask:
    """Fits y = 2 x with one weight; `val` gives each epoch's metric in place of a real one."""

    monitor = "val_mae"
    steps_per_epoch = 2
    compares_crystals = False

    def __init__(self, val=None, poison=()):
        self.model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.model.weight)
        self.val, self.poison = list(val) if val else None, poison
        self.seen, self.modes, self.validations = [], [], 0

    def batches(self, epoch, first):
        for number, crystals in list(enumerate(([1, 2], [3])))[first:]:
            names = [f"crystal-{i}" for i in crystals]
            graph = SimpleNamespace(ids=names, check_status=lambda: None)
            chunk = Chunk(graph, np.array(crystals), torch.arange(len(crystals)), torch.arange(len(crystals)))
            yield Batch(epoch, number, len(crystals), 0, (chunk,))

    def forward(self, batch, chunk):
        self.seen.append(chunk.crystals.tolist())
        self.modes.append(self.model.training)
        x = torch.tensor(chunk.crystals, dtype=torch.float32)[:, None]
        loss = (self.model(x) - 2 * x).square().mean()
        if set(chunk.crystals) & set(self.poison):
            loss = loss * torch.nan
        return ChunkLoss(loss, {"size": torch.tensor(float(batch.size))})

    def validate(self):
        self.model.eval()
        self.validations += 1
        return {"val_mae": self.val[self.validations - 1] if self.val else abs(self.model.weight.item() - 2)}

    def suspects(self, batch):
        return [name for name in batch.ids if int(name[-1]) in self.poison]


def fit(task, optim, log, save=lambda *_: None, *args, **options):
    return Fit(task, optim, log, save, *args, **options).run()


@pytest.fixture
def log(tmp_path):
    with RunLog(tmp_path / "run", FinetuneConfig(), Console(file=io.StringIO())) as log:
        yield log


def test_learns_and_records(log):
    task, saved = LineTask(), []
    result = fit(task, OPTIM, log, lambda *args: saved.append(args))
    assert task.seen == [[1, 2], [3]] * 6
    assert all(task.modes)
    assert [epoch for epoch, _, _ in saved] == [1, 2, 3, 4, 5, 6]
    records = read_metrics(log.folder)
    assert records[-1]["train_loss"] < 0.1 * records[0]["train_loss"]
    assert result.best == min(record["val_mae"] for record in records)
    assert records[result.best_epoch - 1]["val_mae"] == result.best
    # Averages weigh batches by crystals: (2 · 2 + 1 · 1) / 3.
    assert records[0]["train_size"] == pytest.approx(5 / 3)
    assert [record["lr"] for record in records] == [
        pytest.approx(0.3 * warmup_cosine(2 * epoch + 1, 2, 12)) for epoch in range(6)
    ]


def test_early_stopping_and_best(log):
    saved = []
    task = LineTask(val=[5.0, 3.0, 4.0, 3.5, 1.0, 1.0])
    result = fit(
        task,
        OPTIM,
        log,
        lambda epoch, _, improved: saved.append((epoch, improved)),
        EarlyStoppingConfig(patience=2),
    )
    assert saved == [(1, True), (2, True), (3, False), (4, False)]
    assert (result.epochs, result.best_epoch, result.best) == (4, 2, 3.0)


def test_nan_loss_names_the_crystals_and_spares_the_weights(log):
    task = LineTask(poison=[3])
    with pytest.raises(
        NonFiniteLossError,
        match=r"epoch 1, step 2: loss nan.*alone: crystal-3; crystals of the batch: crystal-3\.",
    ):
        fit(task, OPTIM, log)
    assert torch.isfinite(task.model.weight).all()


def test_nan_metric_stops_the_run(log):
    with pytest.raises(NonFiniteLossError, match="epoch 2: val_mae is nan"):
        fit(LineTask(val=[1.0, float("nan")]), OPTIM, log)


def test_gradient_clipping_bounds_the_step(log):
    norms = []

    class Spy(LineTask):
        def validate(self):
            norms.append(self.model.weight.grad.norm().item())
            return super().validate()

    fit(Spy(), OPTIM.model_copy(update={"grad_clip": 0.5, "epochs": 1}), log)
    assert norms[0] == pytest.approx(0.5, rel=1e-4)


def test_every_step_is_recorded(log):
    task = LineTask()
    fit(task, OPTIM, log)
    log.position()
    steps = read_steps(log.folder)
    assert [(record["step"], record["epoch"]) for record in steps] == [(i + 1, i // 2 + 1) for i in range(12)]
    averages = [(2 * a["loss"] + b["loss"]) / 3 for a, b in zip(steps[::2], steps[1::2], strict=True)]
    assert averages == pytest.approx([record["train_loss"] for record in read_metrics(log.folder)])


class Killed(BaseException):
    """What ends a run as if its process were killed: nothing catches it."""


@pytest.mark.parametrize("last_step", range(12))
def test_a_run_continues_from_every_step(tmp_path, last_step):
    """Killed after each step in turn, with states saved every third: the same weights, steps, metrics."""

    class Mortal(LineTask):
        def forward(self, batch, chunk):
            if len(self.seen) == last_step:
                raise Killed
            return super().forward(batch, chunk)

    def run(task, resume=False):
        folder = tmp_path / type(task).__name__
        with RunLog(folder, FinetuneConfig(), Console(file=io.StringIO()), resume=resume) as log:
            checkpoint = CheckpointConfig(every_steps=3)
            store = StateStore(folder)
            stopping = EarlyStoppingConfig(patience=5)
            made = Fit(task, OPTIM, log, lambda *_: None, stopping, store=store, checkpoint=checkpoint)
            if resume and store.exists():
                made.resume()
            elif resume:
                log.rewind(None)
            result = made.run()
        metrics = [{k: v for k, v in r.items() if "seconds" not in k} for r in read_metrics(folder)]
        return result, metrics, read_steps(folder), task.model.weight.item()

    expected = run(LineTask())
    with pytest.raises(Killed):
        run(Mortal())
    resumed = LineTask()
    (tmp_path / "Mortal").rename(tmp_path / "LineTask.old")
    (tmp_path / "LineTask").rename(tmp_path / "whole")
    (tmp_path / "LineTask.old").rename(tmp_path / "LineTask")
    assert run(resumed, resume=True) == expected
    assert len(resumed.seen) < 12 or last_step < 2


def test_the_best_checkpoint_goes_back_with_the_state(tmp_path):
    """A run that goes on from an earlier state forgets the best epoch of the course that it leaves."""
    best, store = tmp_path / "best", StateStore(tmp_path, keep=9)

    def run(task, resume_from=None):
        def save(epoch, metrics, improved):
            if improved:
                replace_file(best, str(epoch).encode())

        log = NullLog(tmp_path, Console(quiet=True))
        fit = Fit(task, OPTIM, log, save, store=store, attached=[best], dataset="a")
        if resume_from is not None:
            fit.resume(resume_from)
        result = fit.run()
        return result.best_epoch, int(best.read_text())

    assert run(LineTask(val=[3.0, 5.0, 5.0, 1.0, 5.0, 5.0])) == (4, 4)
    assert run(LineTask(val=[4.0, 4.0, 4.0]), resume_from=6) == (1, 1)  # after epoch 3
    assert run(LineTask(val=[4.0, 3.0, 2.0, 2.5, 2.5, 2.5]), resume_from=0) == (3, 3)


def test_a_state_of_another_dataset_or_network_is_refused(tmp_path):
    def made(task, dataset):
        log = NullLog(tmp_path, Console(quiet=True))
        return Fit(task, OPTIM, log, lambda *_: None, store=StateStore(tmp_path), dataset=dataset)

    made(LineTask(), "a").run()
    with pytest.raises(CheckpointError, match=r"dataset whose manifest has SHA-256 a, .* b; put that"):
        made(LineTask(), "b").resume()
    other = LineTask()
    other.model = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(CheckpointError, match=r"is another network's.*"):
        made(other, "a").resume()


def test_a_signal_saves_and_stops(tmp_path):
    class Asked(LineTask):
        def forward(self, batch, chunk):
            if len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().forward(batch, chunk)

    with RunLog(tmp_path, FinetuneConfig(), Console(file=io.StringIO())) as log:
        with pytest.raises(RunStoppedError, match=r"after step [56] of 12 \(epoch 3\).*--resume") as caught:
            fit(Asked(), OPTIM, log, store=StateStore(tmp_path))
        assert caught.value.signal == signal.SIGUSR1
        assert StateStore(tmp_path).load()[1]["course"]["step"] in (5, 6)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_run_folder_is_not_overwritten_unasked(tmp_path):
    console = Console(file=io.StringIO())
    with RunLog(tmp_path / "run", FinetuneConfig(), console) as log:
        log.record(1, {"val_mae": 2.0})
        log.write_results({"a": 1})
    with pytest.raises(FileExistsError, match=r"already holds config\.yaml, .*results\.json;"):
        RunLog(tmp_path / "run", FinetuneConfig(), console)
    with RunLog(tmp_path / "run", FinetuneConfig(), console, overwrite=True):
        pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", METRICS, STEPS]


@pytest.mark.parametrize(
    "name",
    ["config.yaml", METRICS, "results.json", "predictions.csv", "best.safetensors", "last.safetensors"],
)
def test_no_file_of_the_users_is_replaced_unasked(name, tmp_path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=f"already holds {name}; .*--overwrite"):
        RunLog(tmp_path, FinetuneConfig(), Console(file=io.StringIO()))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_tensorboard_on_request(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = FinetuneConfig(tensorboard=True)
    with RunLog(tmp_path / "run", config, Console(file=io.StringIO())) as log:
        log.record(3, {"val_mae": 2.0})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_mae")] == [(3, 2.0)]
    assert json.loads((tmp_path / "run" / METRICS).read_text()) == {"epoch": 3, "val_mae": 2.0}
