"""The sections of a report: what each shows of a run, as plain data for the template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..data import CrystalDataset
from ..train.batches import PARTS, select_parts, target_values
from ..train.stagnation import MEAN, ONE_VIEW, SPREAD
from .charts import Chart, Curve, bars, curves
from .content import Column, Headline, Section, Table
from .notices import notices, standard_error
from .record import RunRecord
from .scores import errors, router, worst_predictions
from .svg import number

_ELSEWHERE = {"epoch", "lr", "seconds", "graph_seconds", MEAN, SPREAD, ONE_VIEW}  # shown in other places
_NAMES = {
    "mae": "Mean absolute error",
    "rmse": "Root mean square error",
    "loss": "Loss",
    "contrastive": "Contrastive loss",
    "se3_denoising": "SE(3) denoising loss",
    "so3_denoising": "SO(3) denoising loss",
}


def sections(run: RunRecord, dataset: CrystalDataset | None, reason: str, worst: int) -> list[Section]:
    """Return the sections of a run's report.

    Args:
        run: the run.
        dataset: that it used, or None.
        reason: why there is none.
        worst: crystals in the list of the worst predictions.
    """
    sizes = _sizes(run, dataset)
    found = [_summary(run, sizes), _curves(run)]
    if run.predictions is not None and len(run.predictions.ids):
        found += [errors(run), worst_predictions(run, dataset, reason, worst)]
        if run.predictions.contributions is not None:
            found.append(router(run, dataset))
    found += [_throughput(run, sizes), _configuration(run), _environment(run)]
    return [section for section in found if section is not None]


def duration(seconds: float) -> str:
    """Return a time in the units that suit it."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _sizes(run: RunRecord, dataset: CrystalDataset | None) -> dict[str, int]:
    """Return how many crystals each part of the run has, as far as the dataset is at hand."""
    if dataset is None:
        return {}
    data = run.config.data
    try:
        known = ~np.isnan(target_values(dataset, data.target)) if run.finetunes else None
        parts = select_parts(dataset, data, run.config.seed, known)
    except (ValueError, OSError):  # the split file has gone, or has changed since
        return {}
    if run.finetunes:
        return {part: len(parts[part]) for part in PARTS if len(parts.get(part, ()))}
    train = sum(len(parts.get(part, ())) for part in data.train)
    return {"train": train, "held out": len(parts[data.held_out])}


def _summary(run: RunRecord, sizes: Mapping[str, int]) -> Section:
    epochs = run.config.optim.epochs
    best = "none yet" if run.best is None else f"{run.best['epoch']:g} of {len(run.epochs)}"
    seconds = sum(record.get("seconds", 0.0) for record in run.epochs)
    facts = [
        (
            "State",
            "finished" if run.results is not None else f"in progress, {len(run.epochs)} of {epochs} epochs",
        ),
        ("Best epoch", best),
        ("Training time", f"{duration(seconds)}, validation not counted"),
    ]
    if run.steps is not None:
        facts.append(("Steps", f"{run.steps.count:,}"))
    if sizes:
        facts.append(("Crystals", ", ".join(f"{part} {count:,}" for part, count in sizes.items())))
    if run.finetunes:
        start = run.config.start
        facts.append(("Weights", "from scratch" if start is None else f"from {start}"))
    return Section("summary", "Summary", headline=_headline(run), notices=notices(run), facts=facts)


def _headline(run: RunRecord) -> Headline | None:
    results = run.results or {}
    part = next((name for name in ("test", "val") if name in results), None)
    if part is not None:
        figures = results[part]
        mae = figures["model"]["mae"]
        compared = {
            "this network": (mae, number(mae) + run.suffix, part),
            **{
                f"always the training {name}": (
                    figures[name]["mae"],
                    number(figures[name]["mae"]) + run.suffix,
                    "plain",
                )
                for name in ("median", "mean")
            },
        }
        return Headline(
            f"Mean absolute error on the {part} part",
            number(mae),
            run.unit or "",
            f"{_with_error(run, part)}over {figures['model']['count']:,} crystals. It is one run with one "
            "seed: how much another seed would change it is not in this figure."
            + (" By the val MAE the best epoch was chosen." if part == "val" else ""),
            [bars("Beside trivial predictors", compared)],
        )
    if run.best is None:
        return None
    value = run.best[run.monitor]
    what = "Mean absolute error on the val part" if run.finetunes else "Loss on the held-out part"
    return Headline(
        f"{what}, best epoch",
        number(value),
        (run.unit or "") if run.finetunes else "",
        "By this value the best epoch was chosen, so it is a little too good.",
        [],
    )


def _with_error(run: RunRecord, part: str) -> str:
    """Return "± standard error " of a part's MAE, over its crystals, or nothing where it is not known."""
    if run.predictions is None:
        return "Mean "
    error = np.abs(run.predictions.error[run.predictions.part == part])
    if error.size < 2:
        return "Mean "
    return f"± {number(standard_error(error), 2)}{run.suffix} (standard error) "


def _curves(run: RunRecord) -> Section | None:
    if not run.epochs:
        return None
    names = list(dict.fromkeys(name for record in run.epochs for name in record))
    bases = list(dict.fromkeys(_base(name) for name in names if name not in _ELSEWHERE))
    first = [name for name in ("mae", "loss") if name in bases]
    charts = [_epoch_chart(run, base) for base in dict.fromkeys([*first, *bases])]
    return Section("curves", "Curves", charts=[*charts, *_step_charts(run)])


def _base(name: str) -> str:
    return name.removeprefix("train_").removeprefix("val_")


def _epoch_chart(run: RunRecord, base: str) -> Chart:
    names = {f"train_{base}": "train", f"val_{base}": "val", base: "other"}
    lines = [
        Curve(style if style != "other" else base, x, y, style)
        for name, style in names.items()
        for x, y in [run.series(name)]
        if x.size
    ]
    reference = None
    if base == "contrastive" and not run.finetunes:
        reference = (float(np.log(2 * run.config.optim.batch_size - 1)), "chance")
    unit = run.suffix if base in ("mae", "rmse") else ""
    title = _NAMES.get(base, base.replace("_", " ").capitalize())
    best = None if run.best is None else run.best["epoch"]
    label = base.upper() if base in ("mae", "rmse") else base.replace("_", " ")
    label += f" ({unit.strip()})" if unit else ""
    return curves(title, lines, "epoch", label, best=best, reference=reference)


def _step_charts(run: RunRecord) -> Iterator[Chart]:
    steps = run.steps
    if steps is None:
        return
    note = ""
    if steps.stretch > 1:
        note = (
            f"Mean of each {steps.stretch:,} steps in a row; the band goes from the smallest to the largest."
        )
    titles = {"loss": "Training loss by step", "norm": "Norm of the gradient by step", "lr": "Learning rate"}
    labels = {"loss": "loss", "norm": "gradient norm", "lr": "learning rate"}
    for name, title in titles.items():
        if name in steps.mean:
            band = (steps.low[name], steps.high[name]) if steps.stretch > 1 and name != "lr" else (None, None)
            line = Curve(labels[name], steps.step, steps.mean[name], "train", *band)
            yield curves(title, [line], "step", labels[name], linear=name == "lr", note=note)


def _throughput(run: RunRecord, sizes: Mapping[str, int]) -> Section | None:
    seconds = run.median("seconds")
    if not seconds:
        return None
    facts = [("Time of an epoch", f"{duration(seconds)} (median)")]
    if "train" in sizes:
        facts.append(("Training", f"{number(sizes['train'] / seconds, 3)} crystals/s"))
    if run.steps is not None:
        batch = run.config.optim.batch_size
        facts.append(("Batch", f"{batch} crystals at most"))
    graphs = run.median("graph_seconds")
    if graphs is not None:
        facts.append(("Making graphs", f"{graphs / seconds:.1%} of the time"))
    lines = [
        Curve(name, *run.series(key), style)
        for key, name, style in (("seconds", "all", "train"), ("graph_seconds", "making graphs", "val"))
        if run.series(key)[0].size
    ]
    chart = curves("Time by epoch", lines, "epoch", "seconds")
    return Section("throughput", "Throughput", facts=facts, charts=[chart])


def _configuration(run: RunRecord) -> Section:
    given, published = (
        _flat(run.config.model_dump(mode="json")),
        _flat(type(run.config)().model_dump(mode="json")),
    )
    columns = [Column("setting"), Column("this run", "value"), Column("published recipe", "value")]
    rows = [[key, _text(value), _text(published[key])] for key, value in given.items()]
    changed = [row for row in rows if row[1] != row[2]]
    whole = Table(f"All {len(rows)} settings", columns, rows)
    if not changed:
        return Section("configuration", "Configuration", paragraphs=["The published recipe."], folded=[whole])
    return Section(
        "configuration",
        "Configuration",
        paragraphs=["Where the run differs from the published recipe:"],
        tables=[Table("Settings that differ from the published recipe", columns, changed)],
        folded=[whole],
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _environment(run: RunRecord) -> Section:
    found = run.environment
    if found is None:
        text = (
            "The folder has no environment.json: the run is older than this record, or was copied without it."
        )
        return Section("environment", "Environment", paragraphs=[text])
    facts = [
        (key.capitalize(), str(value))
        for key, value in found.items()
        if key not in ("versions", "dataset") and value is not None
    ]
    facts.append(("Dataset, SHA-256 of its manifest", str(found.get("dataset"))))
    versions = found.get("versions") or {}
    rows = [
        [str(name), "not installed" if version is None else str(version)]
        for name, version in versions.items()
    ]
    table = Table("Versions", [Column("package"), Column("version")], rows)
    return Section("environment", "Environment", facts=facts, tables=[table])
