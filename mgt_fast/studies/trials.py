"""Trials: the runs of a study, in its folder, each run once however often the study is called.

A study's folder holds `pretraining/<name>` and `trials/<name>`, ordinary run folders. A trial that is there
and finished is read, one that was begun is continued bit for bit from its last saved state, and one with
other settings or other crystals is an error: the same command line in the same folder goes on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint import load_checkpoint
from ..data import CrystalDataset
from ..distributed import Ranks
from ..predictions import read_predictions
from ..train.batches import select_parts
from ..train.config import ConfigError, FinetuneConfig, PretrainConfig, RunConfig
from ..train.finetune import finetune
from ..train.interrupt import RunStoppedError
from ..train.pretrain import pretrain
from ..train.runlog import CONFIG, PREDICTIONS, RESULTS, check_same_settings, read_metrics, say
from ..train.setup import crystals_digest, manifest_digest, split_digest

PRETRAINING, TRIALS = "pretraining", "trials"


@dataclass(frozen=True)
class Pretraining:
    """A pretraining that trials of a study start from.

    Attributes:
        name: its folder below `pretraining`.
        config: of the run.
    """

    name: str
    config: PretrainConfig


@dataclass(frozen=True)
class Trial:
    """A fine-tuning run of a study.

    Attributes:
        name: its folder below `trials`.
        config: of the run; `start` stands here if it is a checkpoint from elsewhere.
        pretraining: that it starts from; None for `config.start`, or scratch.
        factors: what tells it from other trials, as {"variant": "router", "seed": 0}.
    """

    name: str
    config: FinetuneConfig
    pretraining: Pretraining | None = None
    factors: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """What a finished trial left.

    Attributes:
        trial: what was run.
        folder: its run folder.
    """

    trial: Trial
    folder: Path

    @cached_property
    def results(self) -> dict[str, Any]:
        """Errors by part, and number of epochs: the run's results.json."""
        return json.loads((self.folder / RESULTS).read_bytes())

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Records of the epochs."""
        return read_metrics(self.folder)

    @cached_property
    def part(self) -> str:
        """The part that the study looks at: test, or val where there is no test part."""
        return "test" if "test" in self.results else "val"

    @property
    def mae(self) -> float:
        """Mean absolute error on that part, in the target's units."""
        return self.results[self.part]["model"]["mae"]

    @cached_property
    def differences(self) -> dict[str, float]:
        """Prediction less target of each crystal of that part, by id."""
        found = read_predictions(self.folder / PREDICTIONS)
        chosen = found.part == self.part
        return dict(zip(found.ids[chosen], found.error[chosen].tolist(), strict=True))

    @property
    def errors(self) -> dict[str, float]:
        """Absolute error of each crystal of that part, by id."""
        return {name: abs(value) for name, value in self.differences.items()}

    @cached_property
    def unit(self) -> str | None:
        """Unit of the target; None if it has none."""
        return read_predictions(self.folder / PREDICTIONS).unit

    def record(self) -> dict[str, Any]:
        """Return the trial's factors and figures, a row of a study's raw figures."""
        found = self.results[self.part]
        return {
            **self.trial.factors,
            "part": self.part,
            "mae": self.mae,
            "rmse": found["model"]["rmse"],
            "trivial_mae": found["mean"]["mae"],
            "epochs": self.results["epochs"],
            "seconds_per_epoch": self.seconds_per_epoch,
        }

    @property
    def seconds_per_epoch(self) -> float:
        """Training time of an epoch, in the median."""
        seconds = sorted(record["seconds"] for record in self.metrics)
        return seconds[len(seconds) // 2]


def run_trials(
    folder: str | Path, trials: Sequence[Trial], console: Console, verbose: bool = False
) -> list[TrialResult]:
    """Run the trials of a study, and the pretrainings they start from, as far as they have not been run.

    Args:
        folder: of the study.
        trials: in the order in which they run.
        console: where a line a run goes.
        verbose: also show what each run says.

    Raises:
        ConfigError: if a run's place holds one with other settings, or of other crystals.
        ValueError: if torchrun started this process among others.
        RunStoppedError: after a signal, with the state saved.
        ValueError, OSError, NonFiniteLossError: as `finetune` and `pretrain`.
    """
    folder = Path(folder)
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(
            f"a study runs on one process, and there are {world}; start it without torchrun, and divide a "
            "large one by its seeds, each part with a folder of its own"
        )
    _check_names(trials)
    within = console if verbose else Console(quiet=True)
    results = []
    for number, trial in enumerate(trials, 1):
        config = trial.config
        if trial.pretraining is not None:
            start = folder / PRETRAINING / trial.pretraining.name
            _run(start, trial.pretraining.config, f"pretraining {trial.pretraining.name}", console, within)
            config = config.model_copy(update={"start": start})
        place = folder / TRIALS / trial.name
        found = TrialResult(trial, place)
        took = _run(place, config, f"trial {number} of {len(trials)}, {trial.name}", console, within)
        say(
            console,
            f"trial {number} of {len(trials)}, {trial.name}: {found.part} MAE {found.mae:.4g} "
            f"({'as found' if took is None else f'{took:.0f} s'})",
        )
        results.append(found)
    return results


def seen_structures(results: Sequence[TrialResult]) -> list[str]:
    """Return a warning if a pretraining has learnt from structures that a trial is scored on."""
    worst, among, name = 0, 0, ""
    for one in results:
        before = None if one.trial.pretraining is None else one.trial.pretraining.config
        if before is None or before.data.path != one.trial.config.data.path:
            continue
        dataset = CrystalDataset.open(before.data.path, verify=False)
        parts = select_parts(dataset, before.data, before.seed)
        learnt = {dataset.ids[i] for part in before.data.train for i in parts.get(part, ())}
        if (seen := len(learnt & one.errors.keys())) > worst:
            worst, among, name = seen, len(one.errors), one.trial.name
    if not worst:
        return []
    return [
        f"the pretraining of {name} has learnt, without labels, from {worst} of the {among} crystals that it "
        "is scored on, which favours it over scratch: name the parts of both by data.split_file "
        "(data.fractions draws those of fine-tuning among the crystals with the target alone)"
    ]


def _run(place: Path, config: RunConfig, what: str, console: Console, within: Console) -> float | None:
    """Run what has not been run; return how many seconds it took, None if it had been run before."""
    start = time.perf_counter()
    run = pretrain if isinstance(config, PretrainConfig) else finetune
    try:
        if (place / CONFIG).is_file() and (place / RESULTS).is_file():
            check_same_settings(place, config)
            _check_same_crystals(place, config)
            return None
        if isinstance(config, PretrainConfig):
            say(console, f"{what} ...")
        run(config, place, within, resume=True)
    except RunStoppedError as stopped:
        message = f"stopped in {what}, as asked; the same command goes on from there"
        raise RunStoppedError(message, stopped.signal) from None
    except Exception:
        say(console, f"{what}: failed")
        raise
    return time.perf_counter() - start


def _check_same_crystals(place: Path, config: RunConfig) -> None:
    """Raise ConfigError unless a finished run saw the crystals and the parts that its configuration names."""
    meta = load_checkpoint(place)[1]
    digest = manifest_digest(CrystalDataset.open(config.data.path, verify=False))
    now = crystals_digest(digest, split_digest(config, Ranks.alone()))
    if (seen := crystals_digest(meta.dataset, meta.split)) != now:
        raise ConfigError(
            f"{place} was run on a dataset whose manifest has SHA-256 {seen}, and now it is {now}; put that "
            "one back, or give the study another folder (--output)"
        )


def _check_names(trials: Sequence[Trial]) -> None:
    """Raise ValueError if two runs of a study would share a folder."""
    names = [trial.name for trial in trials]
    if len(set(names)) < len(names):
        raise ValueError(f"two trials are called {next(name for name in names if names.count(name) > 1)!r}")
    starts = [trial.pretraining for trial in trials if trial.pretraining is not None]
    configs = {start.name: start.config for start in starts}
    for start in starts:
        if start.config != configs[start.name]:
            raise ValueError(f"two pretrainings are called {start.name!r}")
