"""Sensitivity: what settings do to the error, and to the throughput."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console

from ..data import CrystalDataset
from ..data.counts import edge_counts
from ..plots import plot_spread
from ..train.batches import select_parts, target_values
from ..train.config import ConfigError, FinetuneConfig
from ..train.runlog import decisive_settings
from ..train.setup import GRAPH_KEYS, resolve_device
from .output import CERTAINTY, Column, Report, Table, environment, write_report
from .recipe import Recipe, changed, fit_pretraining
from .statistics import CORRECTION, Comparison, compare, summarize
from .trials import Pretraining, Trial, TrialResult, run_trials, seen_structures

_PREFIX = "pretraining."
# What changes which crystals are scored, or in what units: no setting to compare errors over.
_REFUSED = {
    "seed": "use --seeds",
    "start": "use ablate --pretraining",
    **dict.fromkeys(
        ("data.path", "data.target", "data.fractions", "data.split_file", "data.limit"),
        "errors on other crystals or of other targets cannot be compared; make a study of each (for the "
        "number of training crystals: transfer --sizes)",
    ),
}


@dataclass(frozen=True)
class Axis:
    """A key of the configuration and the values it takes; the first is the baseline."""

    key: str
    values: tuple

    @property
    def of_pretraining(self) -> bool:
        """Whether it is a setting of the pretraining alone."""
        return self.key.startswith(_PREFIX)

    def override(self, value: Any) -> str:
        """Return "a.b=c" for the configuration that has the key."""
        key = self.key
        if self.of_pretraining and "." in (rest := key.removeprefix(_PREFIX)):
            key = rest
        return f"{key}={json.dumps(value)}"


def parse_axis(text: str) -> Axis:
    """Read "data.max_neighbors=8,12,16".

    Raises:
        ConfigError: if it is no key with two different values at least, or no setting to sweep over.
    """
    key, equals, values = text.partition("=")
    key = key.strip()
    try:
        found = [_number(value) for value in yaml.safe_load(f"[{values}]")]
    except yaml.YAMLError as error:
        raise ConfigError(f"--over {text}: the values are not valid YAML: {error}") from None
    if not equals or not key or len(found) < 2 or len({json.dumps(value) for value in found}) < len(found):
        raise ConfigError(f"--over {text}: expected a key and two different values at least, as a.b=1,2")
    if key in _REFUSED:
        raise ConfigError(f"--over {key}: {_REFUSED[key]}")
    return Axis(key, tuple(found))


def sweep(
    recipe: Recipe,
    folder: str | Path,
    console: Console,
    axes: Sequence[Axis],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    pretraining: bool = False,
    verbose: bool = False,
) -> Report:
    """Train with every value of a setting, or of the grid of several; the same call goes on where it was.

    Args:
        recipe: of the runs.
        folder: of the study.
        console: where progress and tables go.
        axes: the settings, one or two.
        seeds: the same for all values.
        pretraining: pretrain first; always done where a setting is one of the pretraining.
        verbose: show what each run says.

    Raises:
        ConfigError: for a setting that there is not, or not with these values.
        ValueError: else as `run_trials`.
    """
    if not 1 <= len(axes) <= 2 or len({axis.key for axis in axes}) < len(axes):
        raise ConfigError(f"--over {', '.join(axis.key for axis in axes)}: name one setting or two different")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {', '.join(map(str, seeds)) or 'nothing'}: name each once, one at least")
    pretraining = pretraining or any(axis.of_pretraining for axis in axes)
    points = list(itertools.product(*(axis.values for axis in axes)))
    trials = _trials(recipe, axes, points, seeds, pretraining)
    results = run_trials(folder, trials, console, verbose)
    arms = {
        point: [one for one in results if one.trial.factors["point"] == number]
        for number, point in enumerate(points)
    }
    report = _report(recipe, axes, arms, seeds, pretraining)
    write_report(folder, report, lambda path: _draw(path, axes, report, results[0].unit), console)
    return report


def _trials(
    recipe: Recipe,
    axes: Sequence[Axis],
    points: Sequence[tuple],
    seeds: Sequence[int],
    pretraining: bool,
) -> list[Trial]:
    trials: list[Trial] = []
    for seed in seeds:
        for number, point in enumerate(points):
            pairs = list(zip(axes, point, strict=True))
            tuning = [axis.override(value) for axis, value in pairs if not axis.of_pretraining]
            before = [axis.override(value) for axis, value in pairs if axis.of_pretraining]
            config = changed(recipe.finetuning, *tuning, f"seed={seed}")
            start = None
            if pretraining:
                run = fit_pretraining(recipe.pretraining, config, [*before, f"seed={seed}"])
                decisive = json.dumps(decisive_settings(run), sort_keys=True)
                start = Pretraining(hashlib.sha256(decisive.encode()).hexdigest()[:12], run)
            label = "-".join(f"{axis.key.rpartition('.')[2]}={_text(value)}" for axis, value in pairs)
            label = label.replace("/", "_")
            factors = {axis.key: value for axis, value in pairs} | {"seed": seed, "point": number}
            trials.append(Trial(f"{label}-seed{seed}", config, start, factors))
    return trials


def _report(
    recipe: Recipe,
    axes: Sequence[Axis],
    arms: Mapping[tuple, list[TrialResult]],
    seeds: Sequence[int],
    pretraining: bool,
) -> Report:
    points = list(arms)
    first = arms[points[0]][0]
    errors = {point: {one.trial.factors["seed"]: one.errors for one in arm} for point, arm in arms.items()}
    baseline = _label(axes, points[0])
    comparisons = dict(
        zip(
            points[1:],
            compare(
                [(_label(axes, point), errors[point]) for point in points[1:]],
                [(baseline, errors[points[0]])] * (len(points) - 1),
            ),
            strict=True,
        )
    )
    dataset = CrystalDataset.open(recipe.finetuning.data.path, verify=False)
    speeds = _throughput(dataset, [one for arm in arms.values() for one in arm])
    records = [
        {name: value for name, value in one.record().items() if name != "point"} | speeds[one.trial.name]
        for arm in arms.values()
        for one in arm
    ]
    rows = [_row(axes, point, arms[point], speeds, comparisons.get(point)) for point in points]
    suffix = f", {first.unit}" if first.unit else ""
    columns = [
        *(Column(axis.key, axis.key) for axis in axes),
        Column("mean", f"MAE{suffix}", ".4g"),
        Column("sd", "sd", ".2g"),
        Column("count", "seeds", "d"),
        Column("difference", f"against {baseline}", "+.3g"),
        *CERTAINTY,
        Column("verdict", "verdict"),
        Column("edges_per_crystal", "edges a crystal", ".4g"),
        Column("crystals_per_second", "crystals/s", ".3g"),
        Column("edges_per_second", "edges/s", ".3g"),
    ]
    return Report(
        study="sweep",
        title=f"Sensitivity to {' and '.join(axis.key for axis in axes)}: {recipe.finetuning.data.target}",
        tables=[Table(f"{first.part.capitalize()} errors, training throughput", columns, rows)],
        records=records,
        claims=[one.sentence(first.unit) for one in comparisons.values()],
        warnings=seen_structures([one for arm in arms.values() for one in arm]),
        notes=[
            CORRECTION,
            "Throughput is that of the training steps as they ran, making of graphs included: training "
            "crystals and edges over the median time of an epoch, in the median of the seeds.",
        ],
        settings={
            "over": {axis.key: axis.values for axis in axes},
            "seeds": seeds,
            "pretraining": pretraining,
            "finetuning": recipe.finetuning.model_dump(mode="json"),
            "pretraining_config": recipe.pretraining.model_dump(mode="json") if pretraining else None,
        },
        environment=environment(resolve_device(recipe.finetuning.device), {"target": dataset}),
        details={"points": rows, "comparisons": list(comparisons.values())},
    )


def _row(
    axes: Sequence[Axis],
    point: tuple,
    arm: Sequence[TrialResult],
    speeds: Mapping[str, Mapping[str, float]],
    comparison: Comparison | None,
) -> dict[str, Any]:
    found = summarize([one.mae for one in arm])
    of_arm = [speeds[one.trial.name] for one in arm]
    return {
        **{axis.key: _text(value) for axis, value in zip(axes, point, strict=True)},
        "mean": found.mean,
        "sd": found.sd,
        "count": found.count,
        "maes": [one.mae for one in arm],
        **{name: float(np.median([speed[name] for speed in of_arm])) for name in of_arm[0]},
        "speeds": [speed["crystals_per_second"] for speed in of_arm],
        **({} if comparison is None else comparison.columns()),
    }


def _throughput(dataset: CrystalDataset, results: Sequence[TrialResult]) -> dict[str, dict[str, float]]:
    """Return the rates of each trial's training steps, by its name."""
    counts: dict[tuple, np.ndarray] = {}
    found = {}
    for one in results:
        config = one.trial.config
        train = training_part(dataset, config)
        graphs = {name: getattr(config.data, name) for name in GRAPH_KEYS}
        kind = tuple(graphs.values())
        if kind not in counts:
            counts[kind] = edge_counts(dataset, **graphs)
        edges, seconds = float(counts[kind][train].sum()), one.seconds_per_epoch
        found[one.trial.name] = {
            "edges_per_crystal": edges / len(train),
            "crystals_per_second": len(train) / seconds,
            "edges_per_second": edges / seconds,
        }
    return found


def training_part(dataset: CrystalDataset, config: FinetuneConfig) -> np.ndarray:
    """Return the crystals that a fine-tuning run learns from, as ascending positions."""
    known = ~np.isnan(target_values(dataset, config.data.target))
    return select_parts(dataset, config.data, config.seed, known)["train"]


def _draw(path: Path, axes: Sequence[Axis], report: Report, unit: str | None) -> None:
    """Draw error and throughput over the first setting, a series a value of the second."""
    rows = report.details["points"]
    first, others = axes[0], axes[1].values if len(axes) == 2 else (None,)
    numeric = all(
        isinstance(value, int | float) and not isinstance(value, bool) and value > 0 for value in first.values
    )
    series = {"maes": {}, "speeds": {}}
    for number, other in enumerate(others):
        name = "" if other is None else f"{axes[1].key} = {_text(other)}"
        for key, values in series.items():
            values[name] = [row[key] for row in rows[number :: len(others)]]
    x = first.values if numeric else [_text(value) for value in first.values]
    error = f"MAE ({unit})" if unit else "MAE"
    plot_spread(path, first.key, x, {error: series["maes"], "training crystals/s": series["speeds"]})


def _number(value: Any) -> Any:
    """Return the number that a text stands for, as 1e-3, which YAML takes for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _label(axes: Sequence[Axis], point: tuple) -> str:
    return ", ".join(f"{axis.key} = {_text(value)}" for axis, value in zip(axes, point, strict=True))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
