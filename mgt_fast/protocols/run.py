"""Running a protocol: a fine-tuning run a fold and seed, and our error beside the published ones.

The folder holds `trials/fold-<k>-seed-<s>/`, ordinary run folders, and protocol.json, .csv, .md and .png. The
same command in the same folder goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..checkpoint import load_checkpoint
from ..data import CrystalDataset
from ..studies.output import Column, Report, Table, environment, write_report
from ..studies.statistics import Summary, summarize
from ..studies.trials import Trial, TrialResult, run_trials
from ..train.config import FinetuneConfig, load_config
from ..train.runlog import is_free
from ..train.setup import resolve_device, values_from_checkpoint
from .plot import plot_errors
from .prepare import Prepared
from .recipe import PUBLISHED, Published, Recipe, RecipeError, as_overrides

OURS = "mgt-fast"


@dataclass(frozen=True)
class Score:
    """The outcome of a protocol.

    Attributes:
        mae: mean over seeds of the mean over folds: what benchmarks score.
        by_fold: mean over seeds of each fold's test error.
        by_seed: mean over folds of each seed's.
        crystals: absolute error of each test crystal, the mean over seeds, over all folds.
        ensemble: mean over folds of the error of the seeds' mean prediction; the `mae` for one seed.
    """

    mae: float
    by_fold: Summary
    by_seed: Summary
    crystals: Summary
    ensemble: float

    @property
    def half_interval(self) -> float:
        """Half the width of the confidence interval over test crystals; NaN for one crystal."""
        return (self.crystals.high - self.crystals.low) / 2

    @classmethod
    def of(cls, results: Sequence[TrialResult]) -> Score:
        """Summarize the trials of a protocol, the same seeds in every fold."""
        folds, seeds = ([r.trial.factors[name] for r in results] for name in ("fold", "seed"))
        maes = np.array([r.mae for r in results])
        found: dict[int, dict[str, list[float]]] = {}
        for result, fold in zip(results, folds, strict=True):
            for name, difference in result.differences.items():
                found.setdefault(fold, {}).setdefault(name, []).append(difference)
        crystals = [values for of_fold in found.values() for values in of_fold.values()]
        means = [np.mean([abs(np.mean(values)) for values in of_fold.values()]) for of_fold in found.values()]
        return cls(
            mae=float(maes.mean()),
            by_fold=summarize([maes[np.equal(folds, fold)].mean() for fold in sorted(set(folds))]),
            by_seed=summarize([maes[np.equal(seeds, seed)].mean() for seed in sorted(set(seeds))]),
            crystals=summarize([float(np.abs(values).mean()) for values in crystals]),
            ensemble=float(np.mean(means)),
        )


def run_protocol(
    recipe: Recipe,
    prepared_folder: str | Path,
    folder: str | Path,
    console: Console,
    *,
    variant: str = PUBLISHED,
    overrides: Sequence[str] = (),
    start: str | Path | None = None,
    folds: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    verbose: bool = False,
) -> Report:
    """Fine-tune and score every fold with every seed, as far as that has not been done, and write the report.

    Args:
        recipe: the protocol.
        prepared_folder: what `prepare_protocol` made.
        folder: of the runs and the report.
        console: where progress and the table go.
        variant: of the recipe's settings.
        overrides: "a.b=value" each, over these settings.
        start: checkpoint or run folder of a pretraining; None: from scratch, unless `overrides` name one.
        folds: to run; None for all, which alone is the official score.
        seeds: to run; None for the settings' own.
        verbose: show what each run says.

    Raises:
        RecipeError: if the protocol is not prepared, is for pretraining, or lacks a fold or variant.
        ConfigError: for settings that do not fit; if the folder holds runs with other settings.
        RunStoppedError and others: as `studies.trials.run_trials`.
    """
    prepared = Prepared.open(prepared_folder, recipe)
    if recipe.target is None:
        raise RecipeError(
            f"{recipe.name} has no labels; pretrain on it: mgt-fast pretrain --set "
            f'data.path={prepared.dataset_path} --set "data.fractions=[0.95,0.05,0]"'
        )
    folds = _checked_folds(recipe, folds)
    config = settings(recipe, prepared, variant, overrides, start)
    seeds = list(dict.fromkeys(seeds)) if seeds else [config.seed]
    trials = [_trial(config, prepared, fold, seed) for seed in seeds for fold in folds]
    results = run_trials(folder, trials, console, verbose)
    score = Score.of(results)
    report = report_on(recipe, prepared, config, variant, overrides, results, score)
    write_report(folder, report, lambda path: plot_errors(path, recipe, score), console)
    return report


def settings(
    recipe: Recipe,
    prepared: Prepared,
    variant: str = PUBLISHED,
    overrides: Sequence[str] = (),
    start: str | Path | None = None,
) -> FinetuneConfig:
    """Return the configuration of a protocol's runs; that of fold 0.

    Raises:
        RecipeError: if there is no such variant, or an override changes the crystals or the target.
        ConfigError: for settings that do not fit.
    """
    base: dict[str, Any] = {} if start is None else values_from_checkpoint(load_checkpoint(start)[1])
    crystals = {
        "path": prepared.dataset_path,
        "target": recipe.target,
        "split_file": prepared.split_file(0),
        "fractions": None,
    }
    base["data"] = base.get("data", {}) | crystals
    if start is not None:
        base["start"] = Path(start)
    chosen = as_overrides(recipe.variant(variant))
    config = load_config(FinetuneConfig, None, [*chosen, *overrides], base)
    for key, value in crystals.items():
        if getattr(config.data, key) != value:
            raise RecipeError(f"data.{key} = {getattr(config.data, key)}: the protocol sets it to {value}")
    return config


def report_on(
    recipe: Recipe,
    prepared: Prepared,
    config: FinetuneConfig,
    variant: str,
    overrides: Sequence[str],
    results: Sequence[TrialResult],
    score: Score,
) -> Report:
    """Put our errors beside the published ones; say how sure they are, and what is not comparable."""
    folds = sorted({result.trial.factors["fold"] for result in results})
    seeds = sorted({result.trial.factors["seed"] for result in results})
    warnings = []
    if len(folds) < recipe.num_folds:
        listed = ", ".join(map(str, folds))
        warnings.append(
            f"of {recipe.num_folds} folds only {listed} ran: the official score is the mean of all"
        )
    keys = {text: text.partition("=")[0].strip() for text in overrides}
    changes = [text for text, key in keys.items() if key != "seed" and not is_free(key)]
    if changes:
        warnings.append(f"these are not the {variant} settings: {', '.join(changes)}")
    if prepared.missing:
        warnings.append(
            f"{len(prepared.missing)} crystals of the official parts could not be stored and are left out"
        )
    if config.data.limit is not None:
        warnings.append(f"at most {config.data.limit} crystals of each part were used (data.limit)")
    name = f"{OURS}, {variant} settings{', changed' if changes else ''}"
    name += ", from scratch" if config.start is None else ", pretrained"
    rows = [{"model": one.model, "mae": one.mae, "source": _said(one)} for one in recipe.published]
    rows.append({"model": name, "mae": score.mae, "source": _spreads(score)})
    if len(seeds) > 1:
        of_seeds = f"error of the mean prediction of {len(seeds)} seeds"
        rows.append({"model": f"{name}, ensemble", "mae": score.ensemble, "source": of_seeds})
    unit = f" [{recipe.unit}]" if recipe.unit else ""
    beside = Table(
        f"{recipe.title}: test MAE{unit}",
        [
            Column("model", "model"),
            Column("mae", "MAE", ".4g"),
            Column("source", "source, or spread"),
        ],
        rows,
    )
    runs = Table(
        "Runs",
        [
            Column("fold", "fold", "d"),
            Column("seed", "seed", "d"),
            Column("crystals", "test crystals", "d"),
            Column("mae", "MAE", ".4g"),
            Column("rmse", "RMSE", ".4g"),
            Column("trivial", "MAE of the mean", ".4g"),
            Column("best_epoch", "best epoch", "d"),
            Column("epochs", "epochs", "d"),
        ],
        [_run_row(result) for result in results],
    )
    return Report(
        study="protocol",
        title=f"{recipe.name}: {recipe.title}",
        tables=[beside, runs],
        records=[_run_row(result) for result in results],
        settings={
            "protocol": recipe.name,
            "variant": variant,
            "overrides": list(overrides),
            "config": config.model_dump(mode="json"),
            "folds": folds,
            "seeds": seeds,
            "raw_files": dict(prepared.files),
        },
        environment=environment(
            resolve_device(config.device), {"target": CrystalDataset.open(config.data.path, verify=False)}
        ),
        claims=_claims(recipe, name, score, bool(warnings)),
        warnings=warnings,
        notes=[
            "The interval is that of the mean absolute error over the test crystals (Student's t); it says "
            "nothing of other training crystals. Published errors come without a spread.",
            *recipe.notes,
            *(f"Cite: {text}" for text in recipe.citation),
        ],
        details={"score": score},
    )


def _claims(recipe: Recipe, name: str, score: Score, not_comparable: bool) -> list[str]:
    """Say what was found; a difference to a published error is a number, never a finding."""
    found = [f"{name}: test MAE {score.mae:.4g} {recipe.unit} ({_spreads(score)})"]
    if not_comparable or not recipe.published:
        return found
    best = min(recipe.published, key=lambda one: one.mae)
    share = (score.mae - best.mae) / best.mae
    found.append(
        f"that is {abs(share):.1%} {'above' if share > 0 else 'below'} the {best.mae:g} published for "
        f"{best.model}{f' ({best.note})' if best.note else ''}, which have no spread to test against"
    )
    return found


def _spreads(score: Score) -> str:
    spreads = [f"95 % ± {score.half_interval:.2g} over {score.crystals.count} test crystals"]
    if score.by_fold.count > 1:
        spreads.append(f"sd {score.by_fold.sd:.2g} over {score.by_fold.count} folds")
    seeds = score.by_seed
    spreads.append(f"sd {seeds.sd:.2g} over {seeds.count} seeds" if seeds.count > 1 else "one seed")
    return "; ".join(spreads)


def _run_row(result: TrialResult) -> Mapping[str, Any]:
    scored = result.results[result.part]
    return {
        **result.trial.factors,
        "crystals": scored["model"]["count"],
        "mae": scored["model"]["mae"],
        "rmse": scored["model"]["rmse"],
        "trivial": scored["mean"]["mae"],
        "best_epoch": result.results["best_epoch"],
        "epochs": result.results["epochs"],
    }


def _trial(config: FinetuneConfig, prepared: Prepared, fold: int, seed: int) -> Trial:
    data = config.data.model_copy(update={"split_file": prepared.split_file(fold)})
    return Trial(
        f"fold-{fold}-seed-{seed}",
        config.model_copy(update={"data": data, "seed": seed}),
        factors={"fold": fold, "seed": seed},
    )


def _checked_folds(recipe: Recipe, folds: Sequence[int] | None) -> list[int]:
    chosen = range(recipe.num_folds) if not folds else list(dict.fromkeys(folds))
    wrong = [fold for fold in chosen if fold not in range(recipe.num_folds)]
    if wrong:
        raise RecipeError(f"{recipe.name} has no fold {wrong[0]}; it has 0 to {recipe.num_folds - 1}")
    return list(chosen)


def _said(one: Published) -> str:
    return "; ".join(text for text in (one.source, one.note) if text)
