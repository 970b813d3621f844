"""The training loop: plain torch, the same for pretraining and fine-tuning, for one rank and for many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoint import CheckpointError
from ..distributed import Ranks
from ..durable import replace_file
from ..profiling import span
from .average import WeightAverage
from .config import CheckpointConfig, EarlyStoppingConfig, OptimConfig
from .interrupt import LIMIT, RunStoppedError, StopRequest
from .runlog import NullLog
from .runstate import StateStore, pack_optimizer, unpack_optimizer
from .schedule import BestTracker, warmup_cosine
from .step import Batch, StepResult, StepTask, TrainingStep

_MODEL = "model."  # prefix of the network's tensors in a state


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not a finite number; the message names the batch's crystals."""


class Task(StepTask, Protocol):
    """What a run trains: `pretrain.PretrainTask` or `finetune.FinetuneTask`.

    Attributes:
        steps_per_epoch: number of batches of an epoch.
        monitor: the metric of `validate` that decides which epoch is best; smaller is better.
    """

    steps_per_epoch: int
    monitor: str

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        """Yield this rank's share of an epoch's batches, from number `first` on."""

    def validate(self) -> dict[str, float]:
        """Return the metrics of the held-out part, the same on every rank."""

    def suspects(self, batch: Batch) -> list[str]:
        """Name those of a share's crystals whose loss is not finite even if they are alone."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended: epochs run, the best of them, and its monitored metric."""

    epochs: int
    best_epoch: int
    best: float


@dataclass
class Course:
    """Where a run stands: everything that a later step depends on but network and optimiser.

    Attributes:
        epoch: the one in progress, from 1.
        batch: batches of it that are done.
        step: steps taken in all.
        crystals, sums: seen in this epoch, and the figures added up over them.
        seconds, graph_seconds: spent on this epoch's steps, and on making its graphs.
        best_epoch: of those that are done.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    crystals: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    graph_seconds: float = 0.0
    best_epoch: int = 0

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.batch = self.crystals = 0
        self.sums, self.seconds, self.graph_seconds = {}, 0.0, 0.0


class Fit:
    """A run of training, from its beginning or from a saved state.

    Args:
        task: what is trained and how it is scored.
        optim: optimiser and schedule.
        log: receives a record a step and an epoch.
        save: called on the first rank after each epoch with its number, its metrics and whether it is the
            best so far.
        early_stopping: when to stop; None runs to the end.
        training_step: how a step is computed; None computes it as it stands.
        ranks: of the run; None for a single one.
        store: where states are saved; None saves none.
        checkpoint: when they are saved beside the beginning and the end of each epoch.
        dataset: digest of the crystals that the run sees; a state of others is refused.
        attached: files that belong to a state, and are put back when the run continues from it.
    """

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        log: NullLog,
        save: Callable[[int, dict[str, float], bool], None],
        early_stopping: EarlyStoppingConfig | None = None,
        training_step: TrainingStep | None = None,
        *,
        ranks: Ranks | None = None,
        store: StateStore | None = None,
        checkpoint: CheckpointConfig | None = None,
        dataset: str | None = None,
        attached: Sequence[Path] = (),
    ):
        self.task, self.optim, self.log, self.save = task, optim, log, save
        self.ranks = ranks or Ranks()
        self.training_step = training_step or TrainingStep(
            task, optim.weight_decay, optim.grad_clip, ranks=self.ranks, statistics=optim.statistics
        )
        self.average = None if optim.ema is None else WeightAverage(task.model, optim.ema)
        self.store, self.checkpoint = store, checkpoint or CheckpointConfig()
        self.dataset, self.attached = dataset, attached
        self._stop = StopRequest()
        stopping = early_stopping or EarlyStoppingConfig()
        self.tracker = BestTracker(stopping.patience, stopping.min_delta)
        self.course = Course()
        self.total_steps = optim.epochs * task.steps_per_epoch
        self.warmup_steps = round(optim.warmup_epochs * task.steps_per_epoch)
        self._saved_at = time.monotonic()
        self._told: set[str] = set()

    def resume(self, step: int | None = None) -> None:
        """Take up the latest state, or that of a step; the first rank's log goes back to it.

        Raises:
            CheckpointError: as `StateStore.load`; if the state belongs to another network or dataset.
        """
        with self.ranks.together():
            tensors, record = self.store.load(step)
            if record["dataset"] != self.dataset:
                raise CheckpointError(
                    f"{self.store.folder}: the run saw a dataset whose manifest has SHA-256 "
                    f"{record['dataset']}, and now it is {self.dataset}; put that one back, or start another"
                )
            weights = {k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)}
            try:
                self.task.model.load_state_dict(weights)
            except RuntimeError as error:
                raise CheckpointError(
                    f"{self.store.folder}: the state is another network's: {error}"
                ) from None
            unpack_optimizer(self.training_step.optimizer, tensors)
            if self.average is not None:
                self.average.restore(tensors)
            self.course = Course(**record["course"])
            self.tracker.restore(record["tracker"])
            self.log.rewind(record["log"])
            if self.ranks.is_main:
                self._put_back(step)

    def _put_back(self, step: int | None) -> None:
        """Replace the files that belong to a state; the run may have left the course that wrote them."""
        for path in self.attached:
            data = self.store.attached(path.name, step)
            if data is None:
                path.unlink(missing_ok=True)
            else:
                replace_file(path, data)

    def run(self) -> FitResult:
        """Train until the last epoch, or until the monitored metric stops falling.

        Raises:
            NonFiniteLossError: on a loss, gradient or metric that is not finite, before it reaches weights.
            RunStoppedError: after a signal, with the state saved.
            RankError: if another rank fails.
        """
        course, epochs = self.course, self.optim.epochs
        self._check_ranks()
        if course.step == 0:
            self._save_state()  # whatever happens next, the run can go on with these weights
        limit = LIMIT if self.ranks.size > 1 else None
        with self.log.progress() as progress, StopRequest(limit, self.ranks.name) as self._stop:
            bar = progress.add_task("training", total=self.total_steps, completed=course.step)
            while course.epoch <= epochs and not self.tracker.exhausted:
                progress.update(bar, description=f"epoch {course.epoch}/{epochs}")
                self._train_epoch(lambda: progress.update(bar, advance=1))
                self._end_epoch()
        if self.tracker.exhausted:
            self.log.say(
                f"stopped early: {self.task.monitor} has not fallen for {self.tracker.patience} epochs"
            )
        return FitResult(epochs=course.epoch - 1, best_epoch=course.best_epoch, best=self.tracker.best)

    def _check_ranks(self) -> None:
        """Raise RankError unless all ranks begin at the same step with the same weights."""
        if self.ranks.size == 1:
            return
        bits = {4: torch.int32, 8: torch.int64}
        parameters = (parameter.detach().flatten() for parameter in self.task.model.parameters())
        checksum = sum(
            int(values.view(bits[values.itemsize]).sum(dtype=torch.int64)) for values in parameters
        )
        self.ranks.require_equal({"step": self.course.step, "checksum of weights": checksum}, "beginning")

    def _train_epoch(self, advance: Callable[[], None]) -> None:
        course = self.course
        self.task.model.train()
        batches = self.task.batches(course.epoch, course.batch)
        start = time.perf_counter()
        batch, error = self._built(batches)
        if self.ranks.total([float(error is not None)])[0]:
            self.ranks.agree(error)
        while batch is not None:
            # The next batch is made before this one's exchange, which can then say whether all ranks could.
            following, error = self._built(batches)
            votes = (
                float(error is not None),
                float(self._stop.signal is not None),
                float(self.ranks.is_main and self._save_is_due()),
            )
            failed, stop, save = self.take_step(batch, votes)
            course.seconds += time.perf_counter() - start
            start = time.perf_counter()
            advance()
            if stop or save:
                self._save_state()
            if stop:
                raise RunStoppedError(
                    f"stopped after step {course.step} of {self.total_steps} (epoch {course.epoch}), "
                    "as asked; continue with --resume",
                    self._stop.signal,
                )
            if failed:
                self.ranks.agree(error)
            batch = following

    def _built(self, batches: Iterator[Batch]) -> tuple[Batch | None, Exception | None]:
        """Return the next batch, None after the last, or why it cannot be made.

        What fails on one rank must fail on all, or the others would wait for it.
        """
        start = time.perf_counter()
        try:
            return next(batches, None), None
        except Exception as error:
            return None, error
        finally:
            self.course.graph_seconds += time.perf_counter() - start

    def take_step(self, batch: Batch, votes: tuple[float, ...] = ()) -> list[float]:
        """Learn from one batch and record it; an epoch's end is not looked at.

        Args:
            batch: this rank's share.
            votes: numbers to be added up over the ranks.

        Returns:
            The sums of the votes.

        Raises:
            NonFiniteLossError: see `run`.
        """
        course = self.course
        lr = self.optim.lr * warmup_cosine(course.step, self.warmup_steps, self.total_steps)
        result = self.training_step.gradients(batch, votes)
        loss, norm, *figures = _numbers(result)
        if result.votes is not None:
            figures, votes = figures[: len(result.figures)], figures[len(result.figures) :]
        for chunk in batch.chunks:
            chunk.graph.check_status()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(batch, loss, norm, lr)
        self.training_step.update(lr)
        self._tell_path(batch)
        course.step += 1
        if self.average is not None:
            self.average.update(course.step)
        course.batch += 1
        course.crystals += batch.size
        for name, value in zip(("loss", *result.figures), (loss, *figures), strict=True):
            course.sums[name] = course.sums.get(name, 0.0) + value * batch.size
        named = dict(zip(result.figures, figures, strict=True))
        self.log.record_step(course.step, course.epoch, {"loss": loss, "norm": norm, "lr": lr, **named})
        return list(votes)

    def _tell_path(self, batch: Batch) -> None:
        """Say once that memory does not hold a batch as a whole, and what that costs."""
        path = "chunked" if batch.chunked else "recomputed" if batch.recompute else None
        if path is None or path in self._told:
            return
        self._told.add(path)
        how = {
            "recomputed": "its layers are computed again in the backward pass, about a third more work",
            "chunked": "it is worked on in chunks, several times the work with optim.statistics = global "
            "(local: a third more, with the statistics of each chunk)",
        }[path]
        self.log.say(
            f"step {self.course.step + 1}: {batch.num_edges} edges exceed the memory for one step: {how}; a "
            "larger memory_gib or more ranks avoid it"
        )

    def _refuse(self, batch: Batch, loss: float, norm: float, lr: float) -> None:
        names = [name for share in self.ranks.gather(batch.ids) for name in share]
        suspects = [name for share in self.ranks.gather(self.task.suspects(batch)) for name in share]
        alone = f"not finite even alone: {_listed(suspects)}; " if suspects else ""
        raise NonFiniteLossError(
            f"epoch {batch.epoch}, step {self.course.step + 1}: loss {loss}, gradient norm {norm} at "
            f"learning rate {lr:.3g}; {alone}crystals of the batch: {_listed(names)}. Check their cells "
            "and targets; otherwise lower optim.lr or set optim.grad_clip"
        )

    def _end_epoch(self) -> None:
        """Score the epoch, record it, and save checkpoints and state."""
        with nullcontext() if self.average is None else self.average.in_place():
            self._score_epoch()
        self.course.next_epoch()
        self._save_state()

    def _score_epoch(self) -> None:
        """Score what the network holds, record it, and save it as a checkpoint."""
        course = self.course
        with span("validation"):
            metrics = self.task.validate()
        monitored = metrics[self.task.monitor]
        if not math.isfinite(monitored):
            raise NonFiniteLossError(
                f"epoch {course.epoch}: {self.task.monitor} is {monitored}; lower optim.lr"
            )
        train = {f"train_{name}": value / course.crystals for name, value in course.sums.items()}
        lr = self.optim.lr * warmup_cosine(course.step - 1, self.warmup_steps, self.total_steps)
        timing = {"lr": lr, "seconds": course.seconds, "graph_seconds": course.graph_seconds}
        self.log.record(course.epoch, {**train, **metrics, **timing})
        improved = self.tracker.update(monitored)
        if improved:
            course.best_epoch = course.epoch
        with self.ranks.together(), span("checkpoint"):
            if self.ranks.is_main:
                self.save(course.epoch, metrics, improved)
        self.log.say(_line(course.epoch, self.optim.epochs, {**train, **metrics}, course.seconds, improved))

    def _save_is_due(self) -> bool:
        every, minutes = self.checkpoint.every_steps, self.checkpoint.every_minutes
        return (every is not None and (self.course.step + 1) % every == 0) or (
            minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        )

    def _save_state(self) -> None:
        if self.store is None:
            return
        with self.ranks.together(), span("checkpoint"):
            if self.ranks.is_main:
                weights = {_MODEL + name: value for name, value in self.task.model.state_dict().items()}
                record = {
                    "course": asdict(self.course),
                    "tracker": self.tracker.state(),
                    "log": self.log.position(),
                    "ranks": self.ranks.size,
                    "dataset": self.dataset,
                }
                tensors = weights | pack_optimizer(self.training_step.optimizer)
                if self.average is not None:
                    tensors |= self.average.state()
                self.store.save(self.course.step, tensors, record, self.attached)
        self._saved_at = time.monotonic()


def _listed(names: list[str], most: int = 200) -> str:
    """Join names, not more than a message can hold."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _numbers(result: StepResult) -> list[float]:
    """Read loss, norm, figures and votes from the device, at once."""
    values = (
        result.loss,
        result.norm,
        *result.figures.values(),
        *(() if result.votes is None else result.votes),
    )
    return torch.stack([value.detach().double().reshape(()) for value in values]).tolist()


def _line(epoch: int, epochs: int, figures: Mapping[str, Any], seconds: float, improved: bool) -> str:
    """One epoch's figures as one line."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {shown}  {seconds:.1f} s{'  *' if improved else ''}"
