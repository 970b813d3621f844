"""Transfer: pretrained on one set and fine-tuned on another, against training from scratch, by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..checkpoint import load_checkpoint
from ..data import CrystalDataset
from ..plots import plot_spread
from ..train.batches import require_part, select_parts, target_values
from ..train.config import ConfigError, PretrainConfig, load_config
from ..train.runlog import CONFIG
from ..train.setup import resolve_device
from .mismatch import PretrainingLosses, Speed, mismatch_warnings, pretraining_losses, speeds, write_split
from .output import CERTAINTY, Column, Report, Table, environment, write_report
from .recipe import Recipe, changed, fit_pretraining
from .statistics import CORRECTION, UNRESOLVED, Comparison, compare, summarize
from .trials import PRETRAINING, Pretraining, Trial, TrialResult, run_trials, seen_structures

ALL = "all"
ARMS = ("scratch", "pretrained")
SPLITS, STRUCTURES = "splits", "structures"
NOTE = (
    "Transfer is negative where the pretrained network is worse with confidence, positive where it is better "
    "with confidence. p values of val errors on the way are those of paired t-tests over seeds, corrected by "
    "Holm's method. A smaller training set is contained in a larger one of the same seed."
)


def transfer(
    recipe: Recipe,
    folder: str | Path,
    console: Console,
    *,
    sizes: Sequence[int | str] = (50, 100, 200, 400, ALL),
    seeds: Sequence[int] = (0, 1, 2),
    start: Path | None = None,
    steps: int | None = None,
    verbose: bool = False,
) -> Report:
    """Fine-tune with and without pretraining on larger and larger parts of a set.

    A seed draws an order of the training crystals, and a size takes the first of them, so that a smaller part
    is contained in a larger one and both arms learn from the same. Val and test parts stay as they are. The
    same call goes on where it was.

    Args:
        recipe: of the runs; its pretraining names the source set, its fine-tuning the target set.
        folder: of the study.
        console: where progress and tables go.
        sizes: training crystals; "all" takes those there are.
        seeds: of both arms; the source is pretrained on once a seed.
        start: a checkpoint to take instead of pretraining.
        steps: of every run, whatever its size, by the number of epochs; None keeps the epochs.
        verbose: show what each run says.

    Raises:
        ConfigError: for a size that the set does not have, or repeated sizes or seeds.
        CheckpointError, DataError, ValueError: as `run_trials`.
    """
    folder = Path(folder)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {', '.join(map(str, seeds)) or 'nothing'}: name each once, one at least")
    parts = _target_parts(recipe)
    counts = _counts(sizes, len(parts["train"]))
    trials = _trials(recipe, folder, parts, counts, seeds, start, steps)
    results = run_trials(folder, trials, console, verbose)
    report = _report(recipe, folder, results, parts, counts, seeds, start, steps)
    unit = results[0].unit
    series = {arm: [[one.mae for one in _arm(results, arm, size)] for size in counts] for arm in ARMS}
    panels = {f"{results[0].part} MAE{f' ({unit})' if unit else ''}": series}
    write_report(folder, report, lambda path: plot_spread(path, "training crystals", counts, panels), console)
    return report


def _target_parts(recipe: Recipe) -> dict[str, list[str]]:
    """Return the ids of the target set's parts, of crystals that have the target."""
    config = recipe.finetuning
    dataset = CrystalDataset.open(config.data.path)
    known = ~np.isnan(target_values(dataset, config.data.target))
    parts = select_parts(dataset, config.data, config.seed, known)
    require_part(parts, "train", "learn from")
    require_part(parts, "val", "choose the best epoch on")
    names = ("train", "val", "test")
    return {name: [dataset.ids[i] for i in parts[name]] for name in names if name in parts}


def _counts(sizes: Sequence[int | str], available: int) -> list[int]:
    texts = [str(available if size == ALL else size) for size in sizes]
    counts = {int(text) for text in texts if text.isdecimal() and 2 <= int(text) <= available}
    if not counts or len(counts) < len(texts):
        raise ConfigError(
            f"sizes = {', '.join(map(str, sizes)) or 'nothing'}: expected different numbers from 2 to "
            f"{available}, the training crystals that have the target"
        )
    return sorted(counts)


def _trials(
    recipe: Recipe,
    folder: Path,
    parts: dict[str, list[str]],
    counts: Sequence[int],
    seeds: Sequence[int],
    start: Path | None,
    steps: int | None,
) -> list[Trial]:
    trials = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(parts["train"]))
        pretraining = None
        if start is None:
            run = fit_pretraining(recipe.pretraining, recipe.finetuning, [f"seed={seed}"])
            pretraining = Pretraining(f"seed{seed}", run)
        for size in counts:
            chosen = sorted(parts["train"][i] for i in order[:size])
            file = folder / SPLITS / f"seed{seed}-n{size}.json"
            write_split(file, {**parts, "train": chosen})
            overrides = ["data.fractions=null", "data.limit=null", f"seed={seed}"]
            if steps is not None:
                batches = max(1, round(size / recipe.finetuning.optim.batch_size))
                epochs = max(1, round(steps / batches))
                warmup = min(recipe.finetuning.optim.warmup_epochs, epochs)
                overrides += [f"optim.epochs={epochs}", f"optim.warmup_epochs={warmup}"]
            config = changed(recipe.finetuning, *overrides)
            config = config.model_copy(
                update={"data": config.data.model_copy(update={"split_file": file}), "start": None}
            )
            for arm in ARMS:
                pretrained = arm == "pretrained"
                trials.append(
                    Trial(
                        f"{arm}-n{size}-seed{seed}",
                        config.model_copy(update={"start": start}) if pretrained else config,
                        pretraining if pretrained else None,
                        {"arm": arm, "size": size, "seed": seed},
                    )
                )
    return trials


def _report(
    recipe: Recipe,
    folder: Path,
    results: Sequence[TrialResult],
    parts: dict[str, list[str]],
    counts: Sequence[int],
    seeds: Sequence[int],
    start: Path | None,
    steps: int | None,
) -> Report:
    unit = results[0].unit

    def errors(arm: str, size: int) -> dict[int, dict[str, float]]:
        return {one.trial.factors["seed"]: one.errors for one in _arm(results, arm, size)}

    comparisons = compare(
        [(f"pretrained, {size} crystals", errors("pretrained", size)) for size in counts],
        [("scratch", errors("scratch", size)) for size in counts],
    )
    rows = [_row(results, size, one) for size, one in zip(counts, comparisons, strict=True)]
    ids = [name for members in parts.values() for name in members]
    pretrainings = _pretrainings(recipe, folder, seeds, start)
    losses = [
        pretraining_losses(*pretraining, recipe.finetuning, ids, folder / STRUCTURES)
        for pretraining in pretrainings
    ]
    course = speeds(
        [(size, _arm(results, "pretrained", size), _arm(results, "scratch", size)) for size in counts]
    )
    negative = [
        f"negative transfer: {one.sentence(unit)}; start from scratch, or pretrain on structures like these"
        for one in comparisons
        if one.verdict == "worse"
    ]
    sets = {"target": recipe.finetuning.data.path}
    if pretrainings:
        sets["source"] = pretrainings[0][2].data.path
    return Report(
        study="transfer",
        title=f"Transfer to {recipe.finetuning.data.target}",
        tables=_tables(rows, losses, course, results[0].part, unit),
        records=[one.record() for one in results],
        claims=[one.sentence(unit) for one in comparisons],
        warnings=negative + mismatch_warnings(losses, course, unit) + seen_structures(results),
        notes=[CORRECTION, NOTE],
        settings={
            "sizes": counts,
            "seeds": seeds,
            "start": start,
            "steps": steps,
            "finetuning": recipe.finetuning.model_dump(mode="json"),
            "pretraining_config": None if start else recipe.pretraining.model_dump(mode="json"),
        },
        environment=environment(
            resolve_device(recipe.finetuning.device),
            {name: CrystalDataset.open(path, verify=False) for name, path in sets.items()},
        ),
        details={
            "sizes": rows,
            "comparisons": comparisons,
            "pretraining_losses": losses,
            "course": [asdict(row) for row in course],
        },
    )


def _tables(
    rows: Sequence[dict[str, Any]],
    losses: Sequence[PretrainingLosses],
    course: Sequence[Speed],
    part: str,
    unit: str | None,
) -> list[Table]:
    suffix = f", {unit}" if unit else ""
    errors = Table(
        f"{part.capitalize()} errors by number of training crystals",
        [
            Column("size", "crystals", "d"),
            Column("scratch", f"MAE from scratch{suffix}", ".4g"),
            Column("scratch_sd", "sd", ".2g"),
            Column("pretrained", f"MAE pretrained{suffix}", ".4g"),
            Column("pretrained_sd", "sd", ".2g"),
            Column("count", "seeds", "d"),
            Column("difference", "difference", "+.3g"),
            *CERTAINTY,
            Column("transfer", "transfer"),
        ],
        rows,
    )
    fit = Table(
        "Pretraining losses on held-out crystals of the source and on the target set's",
        [
            Column("pretraining", "pretraining"),
            Column("loss", "loss"),
            Column("source", "source", ".4g"),
            Column("target", "target set", ".4g"),
            Column("chance", "chance", ".4g"),
            Column("crystals", "crystals of each", "d"),
        ],
        [
            {"pretraining": one.name, "loss": name.replace("_", " "), "crystals": one.crystals}
            | {"source": one.source[name], "target": one.target[name], "chance": one.chance.get(name)}
            for one in losses
            for name in one.source
        ],
    )
    way = Table(
        f"Val MAE on the way{suffix}",
        [
            Column("size", "crystals", "d"),
            Column("epoch", "epoch", "d"),
            Column("scratch", "from scratch", ".4g"),
            Column("pretrained", "pretrained", ".4g"),
            Column("difference", "difference", "+.3g"),
            Column("p", "p, seeds", ".2g"),
        ],
        [
            {"size": row.size, "epoch": row.epoch, "scratch": row.scratch, "pretrained": row.pretrained}
            | {"difference": row.test.difference, "p": row.test.p_value}
            for row in course
        ],
    )
    return [errors, fit, way] if losses else [errors, way]


def _row(results: Sequence[TrialResult], size: int, comparison: Comparison) -> dict[str, Any]:
    scratch, pretrained = (summarize([one.mae for one in _arm(results, arm, size)]) for arm in ARMS)
    sign = {"better": "positive", "worse": "negative", UNRESOLVED: UNRESOLVED}
    return {
        "size": size,
        "scratch": scratch.mean,
        "scratch_sd": scratch.sd,
        "pretrained": pretrained.mean,
        "pretrained_sd": pretrained.sd,
        "count": pretrained.count,
        **comparison.columns(),
        "transfer": sign[comparison.verdict],
    }


def _pretrainings(
    recipe: Recipe, folder: Path, seeds: Sequence[int], start: Path | None
) -> list[tuple[str, Path, PretrainConfig]]:
    """Return name, checkpoint and configuration of each pretraining whose losses can be evaluated."""
    if start is None:
        return [
            (
                f"seed{seed}",
                folder / PRETRAINING / f"seed{seed}",
                fit_pretraining(recipe.pretraining, recipe.finetuning, [f"seed={seed}"]),
            )
            for seed in seeds
        ]
    file = (start if start.is_dir() else start.parent) / CONFIG
    if load_checkpoint(start)[1].model.task != "pretrain" or not file.is_file():
        return []  # its pretraining heads or its noise are not known
    stored = load_config(PretrainConfig, file).model_dump(mode="json")
    stored |= {name: getattr(recipe.finetuning, name) for name in ("device", "backend", "threads")}
    return [(start.stem, start, load_config(PretrainConfig, base=stored))]


def _arm(results: Sequence[TrialResult], arm: str, size: int) -> list[TrialResult]:
    wanted = {"arm": arm, "size": size}
    return [one for one in results if wanted.items() <= dict(one.trial.factors).items()]
