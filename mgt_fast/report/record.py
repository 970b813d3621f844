"""What a run folder holds, as the report needs it; a run may still be in progress."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import BEST, LAST, CheckpointMeta, load_checkpoint
from ..predictions import ScoredPredictions, read_predictions
from ..train.config import FinetuneConfig, PretrainConfig, RunConfig, load_config
from ..train.environment import ENVIRONMENT
from ..train.runlog import CONFIG, METRICS, PREDICTIONS, RESULTS, STEPS

MOST_POINTS = 300
"""Points of a curve over steps; each stands for as many steps as it takes."""


class RunFolderError(ValueError):
    """A folder that holds no run, or a damaged one; the message names the file and the remedy."""


@dataclass(frozen=True)
class Steps:
    """Figures of all steps, joined to at most `MOST_POINTS` stretches.

    Attributes:
        count: steps in all.
        stretch: steps a point stands for.
        step: middle of each stretch, (k,).
        mean, low, high: figure name to its mean and its extremes over each stretch, (k,); NaN where no value
            of the stretch is finite.
    """

    count: int
    stretch: int
    step: np.ndarray
    mean: Mapping[str, np.ndarray]
    low: Mapping[str, np.ndarray]
    high: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it.

    Attributes:
        folder: the folder.
        config: of the run.
        epochs: lines of metrics.jsonl, oldest first.
        steps: of steps.jsonl; None before the first line.
        results: of results.json; None while the run is in progress.
        predictions: of a fine-tuning run that has ended; None otherwise.
        environment: of environment.json; None for runs that did not write it.
        meta: of the last checkpoint; None before the first epoch has ended.
    """

    folder: Path
    config: RunConfig
    epochs: list[dict[str, float]]
    steps: Steps | None
    results: dict[str, Any] | None
    predictions: ScoredPredictions | None
    environment: dict[str, Any] | None
    meta: CheckpointMeta | None

    @property
    def finetunes(self) -> bool:
        """Whether it is a fine-tuning run."""
        return isinstance(self.config, FinetuneConfig)

    @property
    def target(self) -> str:
        """What is learned, in words; of a pretraining run, its name."""
        return self.config.data.target.replace("_", " ") if self.finetunes else "pretraining"

    @property
    def unit(self) -> str | None:
        """Of the target."""
        if self.predictions is not None:
            return self.predictions.unit
        return None if self.meta is None else self.meta.unit

    @property
    def suffix(self) -> str:
        """The unit behind a number: with a space before it, or nothing."""
        return f" {self.unit}" if self.unit else ""

    @property
    def monitor(self) -> str:
        """The metric by which the best epoch is chosen."""
        return "val_mae" if self.finetunes else "val_loss"

    @cached_property
    def best(self) -> Mapping[str, float] | None:
        """The record of the best epoch so far."""
        if self.results is not None:
            chosen = [record for record in self.epochs if record["epoch"] == self.results.get("best_epoch")]
            return chosen[0] if chosen else None
        scored = [record for record in self.epochs if np.isfinite(record.get(self.monitor, np.nan))]
        return min(scored, key=lambda record: record[self.monitor], default=None)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs that have a metric, and its values, (k,) each."""
        pairs = [(record["epoch"], record[name]) for record in self.epochs if name in record]
        return tuple(np.array(pairs, np.float64).reshape(-1, 2).T)

    def median(self, name: str) -> float | None:
        """Return a metric's median over the epochs; None if none has it."""
        values = self.series(name)[1]
        return float(np.median(values)) if values.size else None


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder; nothing in it is locked or changed.

    Raises:
        RunFolderError: if the folder holds no run, or a file of it is damaged.
        ConfigError, CheckpointError, ValueError: of the configuration, the checkpoint, the predictions.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise RunFolderError(
            f"{folder} holds no run: it has no {CONFIG}; name a folder that pretrain or finetune wrote"
        )
    text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    kind = PretrainConfig if re.search(r"^pretraining:", text, re.MULTILINE) else FinetuneConfig
    checkpoint = next((folder / name for name in (LAST, BEST) if (folder / name).is_file()), None)
    predictions = folder / PREDICTIONS
    return RunRecord(
        folder=folder,
        config=load_config(kind, folder / CONFIG),
        epochs=list(_lines(folder / METRICS)),
        steps=_steps(folder / STEPS),
        results=_json(folder / RESULTS),
        predictions=read_predictions(predictions) if predictions.is_file() else None,
        environment=_json(folder / ENVIRONMENT),
        meta=None if checkpoint is None else load_checkpoint(checkpoint)[1],
    )


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{file} is damaged ({error}); restore it from a copy") from None
    return values


def _lines(file: Path) -> Iterator[dict[str, float]]:
    """Yield a file's records, without the line that may be in the writing."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
                sound = isinstance(record, dict) and "epoch" in record
                sound = sound and all(type(value) in (int, float) for value in record.values())
            except (ValueError, RecursionError):
                sound = False
            if not sound:
                raise RunFolderError(
                    f"{file}, line {number} is no record of numbers: {line[:80]!r}; restore it from a copy"
                )
            yield record


def _steps(file: Path) -> Steps | None:
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        pieces = iter(lambda: lines.read(2**20), b"")
        count = sum(piece.count(b"\n") for piece in pieces)
    if not count:
        return None
    stretch = -(-count // MOST_POINTS)
    records = _lines(file)
    middles, means, lows, highs = [], [], [], []
    while piece := list(itertools.islice(records, stretch)):
        middles.append(np.mean([record["step"] for record in piece]))
        columns = {
            name: np.array([record.get(name, np.nan) for record in piece], np.float64)
            for name in piece[0].keys() - {"step", "epoch"}
        }
        finite = {name: values[np.isfinite(values)] for name, values in columns.items()}
        for found, reduced in ((means, np.mean), (lows, np.min), (highs, np.max)):
            found.append(
                {name: reduced(values) if values.size else np.nan for name, values in finite.items()}
            )
    names = sorted(means[0])
    return Steps(
        count,
        stretch,
        np.array(middles),
        *(
            {name: np.array([row.get(name, np.nan) for row in found], np.float64) for name in names}
            for found in (means, lows, highs)
        ),
    )
