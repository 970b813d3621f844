"""The sections of a report about predictions: errors, the worst of them, and the router."""

from __future__ import annotations

import numpy as np

from ..data import CrystalDataset
from ..train.stagnation import MEAN, ONE_VIEW, SPREAD
from .charts import Curve, curves, histogram, parity, scatter
from .content import Column, DrawnCrystal, Section, Table
from .crystals import CrystalFacts, describe, positions
from .notices import standard_error
from .record import RunRecord
from .svg import decimals, fixed

_SAMPLE = 300  # crystals whose symmetry is looked for
_SYSTEMS = ("triclinic", "monoclinic", "orthorhombic", "tetragonal", "trigonal", "hexagonal", "cubic")


def errors(run: RunRecord) -> Section:
    """Show the errors of each part, beside trivial predictors, with parity and residuals."""
    scored, unit = run.predictions, f" ({run.unit})" if run.unit else ""
    heads = [
        "crystals",
        "MAE",
        "median",
        "95 %",
        "largest",
        "RMSE",
        "mean error",
        "always mean",
        "always median",
    ]
    rows, parities, residuals = [], [], []
    for part in dict.fromkeys(scored.part.tolist()):
        sound = (scored.part == part) & np.isfinite(scored.error)
        error = scored.error[sound]
        if not error.size:
            continue
        size = np.abs(error)
        places = decimals(size.mean())
        mae = fixed(size.mean(), places)
        if error.size > 1:
            mae += f" ± {fixed(standard_error(size), places)}"
        figures = [
            np.median(size),
            np.quantile(size, 0.95),
            size.max(),
            np.sqrt((error**2).mean()),
            error.mean(),
        ]
        trivial = [(run.results or {}).get(part, {}).get(name, {}).get("mae") for name in ("mean", "median")]
        texts = ["–" if value is None else fixed(value, places) for value in (*figures, *trivial)]
        rows.append([part, f"{error.size:,}", mae, *texts])
        style = part if part in ("val", "test") else "other"
        pair = scored.reference[sound], scored.prediction[sound]
        title = f"{part}: predicted over reference"
        parities.append(parity(title, *pair, scored.ids[sound], style, run.suffix))
        reach = float(np.quantile(size, 0.99)) or 1.0
        edges = np.linspace(-reach, reach, 42)
        label = f"predicted − reference{unit}"
        residuals.append(histogram(f"{part}: residuals", error, edges, label, style, centre=0.0))
    note = (
        f"Absolute errors{f' in {run.unit}' if run.unit else ''}. ± is the standard error of the mean over "
        "the crystals; the spread over seeds needs several runs. The last two columns are the MAE of always "
        "predicting the mean or the median of the training targets."
    )
    columns = [Column("part"), *(Column(head, "number") for head in heads)]
    table = Table("Errors by part", columns, rows)
    return Section(
        "errors", "Errors by part", paragraphs=[note], tables=[table], pairs=[*parities, *residuals]
    )


def worst_predictions(run: RunRecord, dataset: CrystalDataset | None, reason: str, worst: int) -> Section:
    """Show the crystals with the largest errors, drawn if the dataset is there; `reason` says why not."""
    scored = run.predictions
    part = "test" if (scored.part == "test").any() else scored.part[0]
    chosen = np.flatnonzero((scored.part == part) & np.isfinite(scored.error))
    size = np.abs(scored.error[chosen])
    order = chosen[np.argsort(-size, kind="stable")[:worst]]
    share = np.abs(scored.error[order]).sum() / max(size.sum(), 1e-300)
    text = (
        f"The {len(order)} of {len(chosen):,} {part} crystals with the largest errors; together they make "
        f"{share:.0%} of the sum of absolute errors."
    )
    paragraphs = [text]
    facts: dict[str, CrystalFacts] = {}
    if dataset is None:
        paragraphs.append(f"Without structures: {reason}.")
    else:
        where = positions(dataset, scored.ids[order])
        facts = {name: describe(dataset.gather([position])) for name, position in where.items()}
    unit = f" ({run.unit})" if run.unit else ""
    labels = [f"{name}{unit}" for name in ("reference", "predicted", "error")]
    columns = [Column("#", "number"), Column("id", "name"), Column("formula"), Column("atoms", "number")]
    columns += [Column("space group"), *(Column(label, "number") for label in labels)]
    if scored.contributions is not None:
        columns.append(Column("share of SO(3)", "number"))
    rows, crystals, places = [], [], decimals(size.mean())
    for rank, i in enumerate(order.tolist(), 1):
        name, fact = str(scored.ids[i]), facts.get(scored.ids[i])
        known = ["–"] * 3 if fact is None else [fact.formula, f"{fact.num_atoms}", fact.space_group]
        figures = [fixed(values[i], places) for values in (scored.reference, scored.prediction, scored.error)]
        if scored.contributions is not None:
            figures.append(f"{scored.contributions[i, 1]:.2f}")
        rows.append([str(rank), name, *known, *figures])
        if fact is not None:
            crystals.append(DrawnCrystal(rank, name, f"{figures[2]}{run.suffix}", fact))
    table = Table("Worst predictions", columns, rows)
    return Section("worst", "Worst predictions", paragraphs=paragraphs, tables=[table], crystals=crystals)


def router(run: RunRecord, dataset: CrystalDataset | None) -> Section:
    """Show how the router divides predictions between the views."""
    scored = run.predictions
    share = scored.contributions[:, 1]
    unit = f" ({run.unit})" if run.unit else ""
    charts = [
        histogram(
            "Share of the SO(3) view",
            share,
            np.linspace(0, 1, 41),
            "← SE(3)   share   SO(3) →",
            "other",
            centre=0.5,
            height=270,
        ),
        scatter(
            "Share over reference value",
            scored.reference,
            share,
            scored.ids,
            f"{run.target}{unit}, reference",
            "share of the SO(3) view",
            "other",
        ),
    ]
    x, mean = run.series(MEAN)
    if x.size:
        spread = run.series(SPREAD)[1]
        line = Curve("share of the SO(3) view", x, mean, "other", mean - spread, mean + spread)
        note = "Mean over the val crystals; the band is one standard deviation to each side."
        charts.append(curves("Share by epoch", [line], "epoch", "share of the SO(3) view", note=note))
    x, at_one_view = run.series(ONE_VIEW)
    if x.size:
        label = "share of val crystals"
        line = Curve(label, x, at_one_view, "other")
        charts.append(curves("Crystals that one view predicts alone", [line], "epoch", label))
    text = (
        f"The SO(3) view's term makes {share.mean():.0%} of the size of both views' terms on average "
        f"(standard deviation over {len(share):,} crystals {share.std():.2f}). A share is no importance: two "
        "large terms of opposite sign both count."
    )
    return Section("router", "Router", paragraphs=[text], tables=_by_system(run, dataset), charts=charts)


def _by_system(run: RunRecord, dataset: CrystalDataset | None) -> list[Table]:
    """Return the shares by crystal system, of crystals spread evenly over the predictions."""
    if dataset is None:
        return []
    scored = run.predictions
    rows = np.unique(np.linspace(0, len(scored.ids) - 1, _SAMPLE).round().astype(int))
    where = positions(dataset, scored.ids[rows])
    shares: dict[str, list[float]] = {}
    for row in rows.tolist():
        if scored.ids[row] in where:
            facts = describe(dataset.gather([where[scored.ids[row]]]), draw=False)
            shares.setdefault(facts.system, []).append(scored.contributions[row, 1])
    columns = [
        Column("crystal system"),
        *(Column(name, "number") for name in ("crystals", "mean share", "standard deviation")),
    ]
    cells = [
        [
            system,
            str(len(found)),
            f"{np.mean(found):.3f}",
            f"{np.std(found, ddof=1):.3f}" if len(found) > 1 else "–",
        ]
        for system in _SYSTEMS
        if (found := shares.get(system))
    ]
    return [Table(f"Share of the SO(3) view by crystal system, of {len(where)} crystals", columns, cells)]
