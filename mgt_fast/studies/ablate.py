"""Ablation: one view, both, and two ways to fuse them; with and without pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import MGTConfig
from ..data import CrystalDataset
from ..model import MGT
from ..plots import plot_spread
from ..train.setup import resolve_device
from .output import CERTAINTY, Column, Report, Table, environment, write_report
from .recipe import Recipe, changed, fit_pretraining
from .statistics import CORRECTION, Comparison, compare, summarize
from .trials import Pretraining, Trial, TrialResult, run_trials, seen_structures

VARIANTS = {
    "se3": ("model.views=se3",),
    "so3": ("model.views=so3",),
    "concat": ("model.views=both", "model.fusion=concat"),
    "router": ("model.views=both", "model.fusion=router"),
}
LABELS = {"se3": "SE(3) only", "so3": "SO(3) only", "concat": "concatenation", "router": "router"}
SCRATCH, OWN = "none", "own"


def ablate(
    recipe: Recipe,
    folder: str | Path,
    console: Console,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    pretraining: Sequence[str] = (SCRATCH, OWN),
    variants: Sequence[str] = tuple(VARIANTS),
    verbose: bool = False,
) -> Report:
    """Train every variant with every start and seed, and compare them; the same call goes on where it was.

    Args:
        recipe: of the runs.
        folder: of the study.
        console: where progress and tables go.
        seeds: of weights, order and dropout; the same for all arms.
        pretraining: "none"; "own", which pretrains each choice of views once a seed; or checkpoints of both
            views, as files or run folders.
        variants: names from `VARIANTS`; all are compared with the last.
        verbose: show what each run says.

    Raises:
        ValueError: for unknown or repeated names; else as `run_trials`.
    """
    for values, what in ((seeds, "seeds"), (pretraining, "pretraining"), (variants, "variants")):
        if not values or len(set(values)) < len(values):
            raise ValueError(
                f"{what} = {', '.join(map(str, values)) or 'nothing'}: name each once, one at least"
            )
    if unknown := set(variants) - VARIANTS.keys():
        raise ValueError(f"no variant {', '.join(sorted(unknown))}; choose of {', '.join(VARIANTS)}")
    results = run_trials(folder, _trials(recipe, seeds, pretraining, variants), console, verbose)
    report = _report(recipe, results, seeds, pretraining, variants)
    unit = results[0].unit
    series = {
        _start_label(start): [[one.mae for one in _arm(results, variant, start)] for variant in variants]
        for start in pretraining
    }
    panels = {f"{results[0].part} MAE{f' ({unit})' if unit else ''}": series}
    names = [LABELS[variant] for variant in variants]
    write_report(folder, report, lambda path: plot_spread(path, None, names, panels), console)
    return report


def number_of_parameters(config: MGTConfig) -> int:
    """Return how many parameters a network has."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MGT(config).parameters())


def _trials(
    recipe: Recipe, seeds: Sequence[int], starts: Sequence[str], variants: Sequence[str]
) -> list[Trial]:
    trials = []
    for seed in seeds:  # a seed after another, so that a study that is stopped has whole pairs
        for start in starts:
            for variant in variants:
                config = changed(recipe.finetuning, *VARIANTS[variant], f"seed={seed}")
                own = None
                if start == OWN:
                    views = config.model.views
                    run = fit_pretraining(recipe.pretraining, config, [f"seed={seed}"])
                    own = Pretraining(f"{views}-seed{seed}", run)
                elif start != SCRATCH:
                    config = config.model_copy(update={"start": Path(start)})
                name = f"{variant}-{start if start in (SCRATCH, OWN) else Path(start).stem}-seed{seed}"
                factors = {"variant": variant, "pretraining": start, "seed": seed}
                trials.append(Trial(name, config, own, factors))
    return trials


def _report(
    recipe: Recipe,
    results: Sequence[TrialResult],
    seeds: Sequence[int],
    starts: Sequence[str],
    variants: Sequence[str],
) -> Report:
    unit, part = results[0].unit, results[0].part
    baseline = variants[-1]
    comparisons = _comparisons(results, starts, variants)
    rows = [
        _row(results, variant, start, comparisons.get((variant, start)))
        for start in starts
        for variant in variants
    ]
    suffix = f", {unit}" if unit else ""
    columns = [
        Column("pretraining", "pretraining"),
        Column("variant", "variant"),
        Column("mean", f"MAE{suffix}", ".4g"),
        Column("sd", "sd", ".2g"),
        Column("low", "95 % from", ".4g"),
        Column("high", "to", ".4g"),
        Column("count", "seeds", "d"),
        Column("difference", f"against {LABELS[baseline]}", "+.3g"),
        *CERTAINTY,
        Column("verdict", "verdict"),
        Column("parameters", "parameters", ",d"),
        Column("seconds", "s an epoch", ".3g"),
    ]
    data = recipe.finetuning.data
    return Report(
        study="ablate",
        title=f"Views and fusion: {data.target}",
        tables=[Table(f"{part.capitalize()} errors", columns, rows)],
        records=[one.record() for one in results],
        claims=[one.sentence(unit) for one in comparisons.values()],
        warnings=seen_structures(results),
        notes=[CORRECTION],
        settings={
            "seeds": seeds,
            "pretraining": starts,
            "variants": variants,
            "finetuning": recipe.finetuning.model_dump(mode="json"),
            "pretraining_config": recipe.pretraining.model_dump(mode="json"),
        },
        environment=environment(
            resolve_device(recipe.finetuning.device), {"target": CrystalDataset.open(data.path, verify=False)}
        ),
        details={"arms": rows, "comparisons": list(comparisons.values())},
    )


def _comparisons(
    results: Sequence[TrialResult], starts: Sequence[str], variants: Sequence[str]
) -> dict[tuple, Comparison]:
    """Compare variants with the last one, for each start; and starts with the first, for each variant."""
    baseline, keys, arms, bases = variants[-1], [], [], []
    for start in starts:
        for variant in variants[:-1]:
            keys.append((variant, start))
            arms.append((variant, start))
            bases.append((baseline, start))
    for start in starts[1:]:
        for variant in variants:
            keys.append((variant, start, starts[0]))
            arms.append((variant, start))
            bases.append((variant, starts[0]))

    def named(arm: tuple[str, str]) -> tuple[str, Mapping[int, Mapping[str, float]]]:
        variant, start = arm
        return f"{LABELS[variant]}, {_start_label(start)}", {
            one.trial.factors["seed"]: one.errors for one in _arm(results, variant, start)
        }

    found = compare([named(arm) for arm in arms], [named(base) for base in bases])
    return dict(zip(keys, found, strict=True))


def _row(
    results: Sequence[TrialResult], variant: str, start: str, comparison: Comparison | None
) -> dict[str, Any]:
    arm = _arm(results, variant, start)
    found = summarize([one.mae for one in arm])
    row = {
        "pretraining": start,
        "variant": LABELS[variant],
        "mean": found.mean,
        "sd": found.sd,
        "low": found.low,
        "high": found.high,
        "count": found.count,
        "parameters": number_of_parameters(arm[0].trial.config.model),
        "seconds": sorted(one.seconds_per_epoch for one in arm)[len(arm) // 2],
    }
    return row if comparison is None else row | comparison.columns()


def _arm(results: Sequence[TrialResult], variant: str, start: str) -> list[TrialResult]:
    wanted = {"variant": variant, "pretraining": start}
    return [one for one in results if wanted.items() <= dict(one.trial.factors).items()]


def _start_label(start: str) -> str:
    return {SCRATCH: "from scratch", OWN: "pretrained"}.get(start, f"from {start}")
