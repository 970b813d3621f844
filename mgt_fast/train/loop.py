"""The training loop: plain torch, the same for pretraining and fine-tuning."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from ..graph import CrystalGraph
from .config import EarlyStoppingConfig, OptimConfig
from .runlog import RunLog
from .schedule import BestTracker, warmup_cosine
from .step import TrainingStep


class NonFiniteLossError(RuntimeError):
    """A loss or gradient that is not a finite number; the message names the batch's crystals."""


class Task(Protocol):
    """What a run trains: `pretrain.PretrainTask` or `finetune.FinetuneTask`.

    Attributes:
        model: the network.
        steps_per_epoch: number of batches of an epoch.
        monitor: the metric of `validate` that decides which epoch is best; smaller is better.
    """

    model: torch.nn.Module
    steps_per_epoch: int
    monitor: str

    def batches(self, epoch: int) -> Iterable[np.ndarray]:
        """Yield the crystals of each batch of an epoch."""

    def graph(self, indices: np.ndarray) -> CrystalGraph:
        """Build the graphs of a batch."""

    def loss(self, indices: np.ndarray, graph: CrystalGraph) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch, and figures to average over the epoch."""

    def validate(self) -> dict[str, float]:
        """Return the metrics of the held-out part."""


@dataclass(frozen=True)
class FitResult:
    """How a run ended: epochs run, the best of them, and its monitored metric."""

    epochs: int
    best_epoch: int
    best: float


def fit(
    task: Task,
    optim: OptimConfig,
    log: RunLog,
    save: Callable[[int, dict[str, float], bool], None],
    early_stopping: EarlyStoppingConfig | None = None,
    training_step: TrainingStep | None = None,
) -> FitResult:
    """Train until the last epoch, or until the monitored metric stops falling.

    Args:
        task: what is trained and how it is scored.
        optim: optimiser and schedule.
        log: receives a record an epoch.
        save: called after each epoch with its number, its metrics and whether it is the best so far.
        early_stopping: when to stop; None runs to the end.
        training_step: how a step is computed; None computes it as it stands.

    Raises:
        NonFiniteLossError: on a loss, gradient or metric that is not finite, before it reaches the weights.
    """
    model = task.model
    training_step = training_step or TrainingStep(task, optim.weight_decay, optim.grad_clip)
    total_steps = optim.epochs * task.steps_per_epoch
    warmup_steps = round(optim.warmup_epochs * task.steps_per_epoch)
    stopping = early_stopping or EarlyStoppingConfig()
    tracker = BestTracker(stopping.patience, stopping.min_delta)
    step = best_epoch = 0
    with log.progress() as progress:
        bar = progress.add_task("training", total=total_steps)
        for epoch in range(1, optim.epochs + 1):
            model.train()
            start, graph_seconds, crystals = time.perf_counter(), 0.0, 0
            sums: defaultdict[str, float] = defaultdict(float)
            for indices in task.batches(epoch):
                built = time.perf_counter()
                graph = task.graph(indices)
                graph_seconds += time.perf_counter() - built
                lr = optim.lr * warmup_cosine(step, warmup_steps, total_steps)
                result = training_step.gradients(indices, graph)
                loss, norm = result.loss.item(), result.norm.item()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise NonFiniteLossError(
                        f"epoch {epoch}, step {step + 1}: loss {loss}, gradient norm {norm} at learning rate "
                        f"{lr:.3g}; crystals of the batch: {', '.join(graph.ids)}. Check their cells and "
                        "targets; otherwise lower optim.lr or set optim.grad_clip"
                    )
                training_step.update(lr)
                step += 1
                crystals += len(indices)
                for name, value in {"loss": loss, **result.figures}.items():
                    sums[name] += float(value) * len(indices)
                progress.update(bar, advance=1, description=f"epoch {epoch}/{optim.epochs}")
            seconds = time.perf_counter() - start
            metrics = task.validate()
            monitored = metrics[task.monitor]
            if not math.isfinite(monitored):
                raise NonFiniteLossError(f"epoch {epoch}: {task.monitor} is {monitored}; lower optim.lr")
            train = {f"train_{name}": value / crystals for name, value in sums.items()}
            timing = {"lr": lr, "seconds": seconds, "graph_seconds": graph_seconds}
            log.record(epoch, {**train, **metrics, **timing})
            improved = tracker.update(monitored)
            if improved:
                best_epoch = epoch
            save(epoch, metrics, improved)
            log.say(_line(epoch, optim.epochs, {**train, **metrics}, seconds, improved))
            if tracker.exhausted:
                log.say(f"stopped early: {task.monitor} has not fallen for {tracker.patience} epochs")
                break
    return FitResult(epochs=epoch, best_epoch=best_epoch, best=tracker.best)


def _line(epoch: int, epochs: int, figures: dict[str, float], seconds: float, improved: bool) -> str:
    """One epoch's figures as one line."""
    shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    return f"epoch {epoch:>{len(str(epochs))}}/{epochs}  {shown}  {seconds:.1f} s{'  *' if improved else ''}"
