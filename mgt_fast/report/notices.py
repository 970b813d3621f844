"""What a reader of a run should know before its figures: each with numbers, and what can be done."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..train.stagnation import stagnation
from .record import RunRecord

_RISE = 1.1  # of the metric over its best, from which on it counts as risen
_SPIKE = 100.0  # of the gradient's norm over its median
_FEW = 50  # crystals


@dataclass(frozen=True)
class Notice:
    """A sentence for the reader; a warning says that the figures may mislead."""

    kind: Literal["warning", "note"]
    text: str


def notices(run: RunRecord) -> list[Notice]:
    """Return what is to be said of a run, warnings first."""
    found = [*_progress(run), *_course(run), *_steps(run), *_scores(run)]
    return sorted(found, key=lambda notice: notice.kind != "warning")


def _progress(run: RunRecord) -> Iterator[Notice]:
    planned, done = run.config.optim.epochs, len(run.epochs)
    if run.results is None:
        yield Notice(
            "note",
            f"The run has not ended: {done} of {planned} epochs are done. If it is no longer running, "
            "the command that began it continues it with --resume.",
        )
    elif done < planned:
        patience = run.config.early_stopping.patience if run.finetunes else None
        yield Notice(
            "note",
            f"Stopped early after {done} of {planned} epochs: {run.monitor} had not fallen for {patience} "
            "epochs.",
        )


def _course(run: RunRecord) -> Iterator[Notice]:
    broken = {
        name: record["epoch"]
        for record in run.epochs
        for name, value in record.items()
        if not np.isfinite(value)
    }
    for name, epoch in broken.items():
        yield Notice(
            "warning", f"{name} is not finite in epoch {epoch}; lower optim.lr or set optim.grad_clip."
        )
    if run.best is not None and len(run.epochs) > 1:
        best, last = run.best[run.monitor], run.epochs[-1].get(run.monitor, np.nan)
        if run.best is run.epochs[-1] and run.results is not None:
            yield Notice(
                "note",
                f"The last epoch has the best {run.monitor}: a longer run (optim.epochs) may do better.",
            )
        elif last > _RISE * best:
            yield Notice(
                "warning",
                f"{run.monitor} rose from {best:.4g} in epoch {run.best['epoch']:g} to {last:.4g} at the "
                "end, which looks like overfitting: more crystals, weight decay, dropout or fewer epochs may "
                "help.",
            )
    if run.finetunes:
        for count in range(1, len(run.epochs) + 1):
            text = stagnation(run.epochs[:count], run.config.router_monitor)
            if text is not None:
                yield Notice("warning", text.removeprefix("warning: "))


def _steps(run: RunRecord) -> Iterator[Notice]:
    if run.steps is None or "norm" not in run.steps.mean:
        return
    typical, high = np.nanmedian(run.steps.mean["norm"]), run.steps.high["norm"]
    largest = np.nanmax(high)
    clip = run.config.optim.grad_clip
    if largest > _SPIKE * typical and clip is None:
        near = run.steps.step[np.nanargmax(high)]
        yield Notice(
            "warning",
            f"The gradient's norm reached {largest:.3g} near step {near:.0f}, typically it is {typical:.3g}; "
            "optim.grad_clip limits it.",
        )


def _scores(run: RunRecord) -> Iterator[Notice]:
    scored = run.predictions
    if scored is None or run.results is None:
        return
    if not np.isfinite(scored.error).all():
        yield Notice("warning", f"{int((~np.isfinite(scored.error)).sum())} predictions are not finite.")
    for part in ("val", "test"):
        error = np.abs(scored.error[scored.part == part])
        if part not in run.results or not error.size:
            continue
        figures = run.results[part]
        mae = figures["model"]["mae"]
        if error.size != figures["model"]["count"] or not np.isclose(error.mean(), mae, rtol=1e-4):
            yield Notice(
                "warning",
                f"predictions.csv is not the table that results.json was made of: its {part} MAE is "
                f"{error.mean():.4g} over {error.size} crystals, not {mae:.4g} over "
                f"{figures['model']['count']}; evaluate the checkpoint again.",
            )
        trivial = min(figures["mean"]["mae"], figures["median"]["mae"])
        if mae >= trivial:
            yield Notice(
                "warning",
                f"On {part} the network (MAE {mae:.4g}{run.suffix}) is no better than always predicting the "
                f"mean or median of the training targets ({trivial:.4g}{run.suffix}): train longer, or look "
                "at the targets and the learning rate.",
            )
        if error.size < _FEW:
            yield Notice(
                "note",
                f"The {part} part has {error.size} crystals: its MAE has a standard error of "
                f"{standard_error(error):.2g}{run.suffix}.",
            )


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of a mean; NaN for a single value."""
    return float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else float("nan")
