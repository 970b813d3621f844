"""Tables, claims and picture of the study of the router."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..plots import COLORS, STYLE
from ..train.stagnation import EVEN, MEAN, ONE_VIEW, SPREAD
from .correlation import FEWEST
from .descriptors import DESCRIPTORS
from .output import Column, Report, Table
from .statistics import CONFIDENCE

if TYPE_CHECKING:
    from .correlation import Correlation
    from .router import Agreement, Analysis

STUDY = "router"
LABELS = DESCRIPTORS | {"reference": "target: its value", "absolute_error": "target: absolute error"}
SAME, CONTRADICTORY = "the same", "contradictory"
_MOST_CLAIMS = 5  # correlations of a network
_MOST_LISTED = 10  # crystals in a message
_NOTES = (
    f"Intervals are of {CONFIDENCE:.0%}; p values are corrected by Holm for all tests of a network (of all "
    "pairs, for agreement). A rank correlation says what the share goes with, not what causes it, and "
    "descriptors go with one another. It is that of one network: another seed may divide the work otherwise, "
    "so give networks of several seeds and look whether they agree.",
)


def report_on(
    analyses: Sequence[Analysis],
    agreement: Sequence[Agreement],
    ids: Sequence[str],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Report:
    """Put what was found into words and tables.

    Args:
        analyses: of each network.
        agreement: of each two networks.
        ids: of the dataset's crystals.
        settings, environment: of the study; see `Report`.
    """
    unknown = {
        ids[index]: crystal.problem
        for analysis in analyses
        for index, crystal in zip(analysis.shares.indices.tolist(), analysis.symmetry, strict=True)
        if crystal.problem
    }
    warnings = [warning for analysis in analyses for warning in _warnings(analysis)]
    if unknown:
        warnings.append(
            f"{len(unknown)} crystals have no crystal system and are in no group: {_listed(unknown)}"
        )
    tables = [_overview(analyses)]
    for analysis in analyses:
        tables += [_correlations(analysis), _systems(analysis)]
    targets = list(dict.fromkeys(analysis.shares.target for analysis in analyses))
    tasks = [[one for one in analyses if one.shares.target == target] for target in targets]
    repeated = [task for task in tasks if len(task) > 1]
    tables += [_consistency(task) for task in repeated]
    if agreement:
        tables.append(_agreement(agreement))
    return Report(
        study=STUDY,
        title="Contributions of the views",
        tables=tables,
        records=[record for analysis in analyses for record in _records(analysis, ids)],
        settings=settings,
        environment=environment,
        claims=[
            *(claim for analysis in analyses for claim in _claims(analysis)),
            *(_agreement_claim(pair) for pair in agreement if pair.same_target),
            *(_consistency_claim(task) for task in repeated),
        ],
        warnings=warnings,
        notes=_NOTES,
        details={
            "models": {analysis.shares.name: _details(analysis) for analysis in analyses},
            "agreement": agreement,
            "no_crystal_system": unknown,
        },
    )


def draw(path: str | Path, analyses: Sequence[Analysis]) -> None:
    """Draw shares, correlations and crystal systems, a row a network, and write a PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 3.9 * len(analyses)), layout="constrained")
        FigureCanvasAgg(figure)
        for row, analysis in zip(
            figure.subplots(len(analyses), 3, squeeze=False, width_ratios=(1, 1.5, 1)), analyses, strict=True
        ):
            _draw_histogram(row[0], analysis)
            _draw_correlations(row[1], analysis)
            _draw_systems(row[2], analysis)
        figure.savefig(path, dpi=150)


def _draw_histogram(ax, analysis: Analysis) -> None:
    ax.hist(analysis.shares.so3, bins=np.linspace(0, 1, 41), color=COLORS["train"])
    ax.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
    ax.set(
        xlabel="← SE(3) view    share of the SO(3) view →",
        ylabel="crystals",
        xlim=(0, 1),
        title=f"{analysis.shares.name}: {analysis.shares.target or 'prediction'}",
    )


def _draw_correlations(ax, analysis: Analysis) -> None:
    drawn = {name: one for name, one in analysis.correlations.items() if math.isfinite(one.rho)}
    for height, one in enumerate(reversed(drawn.values())):
        color = COLORS["train"] if one.resolved else "0.6"
        ax.plot((one.low, one.high), (height, height), color=color, linewidth=2)
        ax.plot(one.rho, height, "o", color=color, markersize=5)
    ax.axvline(0, color="0.5", linestyle="--", linewidth=1)
    ax.set_yticks(range(len(drawn)), [LABELS[name] for name in reversed(drawn)], fontsize=8)
    ax.set(xlim=(-1, 1), xlabel="Spearman's ρ with the share of the SO(3) view", title="grey: not resolved")


def _draw_systems(ax, analysis: Analysis) -> None:
    names = list(analysis.groups)
    if names:
        ax.boxplot(
            list(analysis.groups.values()), orientation="horizontal", widths=0.6, flierprops={"markersize": 3}
        )
    labels = [f"{name} ({len(analysis.groups[name])})" for name in names]
    ax.set_yticks(range(1, len(names) + 1), labels, fontsize=8)
    ax.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
    ax.set(xlim=(0, 1), xlabel="share of the SO(3) view", title="crystal systems")


def _claims(analysis: Analysis) -> list[str]:
    name, figures = analysis.shares.name, analysis.figures
    claims = [
        f"{name}: the SO(3) view has {figures[MEAN]:.3f} ± {figures[SPREAD]:.3f} of a prediction (mean and "
        f"standard deviation over {len(analysis.shares.so3)} crystals), the SE(3) view the rest"
    ]
    resolved = [(key, one) for key, one in analysis.correlations.items() if one.resolved]
    for key, one in sorted(resolved, key=lambda item: -abs(item[1].rho))[:_MOST_CLAIMS]:
        claims.append(
            f"{name}: the SO(3) view's share {'rises' if one.rho > 0 else 'falls'} with {LABELS[key]}: ρ = "
            f"{one.rho:.2f} [{one.low:.2f}, {one.high:.2f}], p = {one.p_value:.2g}, {one.count} crystals"
        )
    if not resolved:
        claims.append(f"{name}: no correlation of the share with a descriptor is resolved")
    systems = analysis.systems
    if math.isnan(systems.p_value):
        return claims
    figures = f"η² = {systems.effect:.2f}, p = {systems.p_value:.2g}"
    if systems.p_value < 1 - CONFIDENCE:
        medians = {k: np.median(group) for k, group in analysis.groups.items() if len(group) >= FEWEST}
        low, high = min(medians, key=medians.get), max(medians, key=medians.get)
        claims.append(
            f"{name}: crystal systems differ ({figures}): median share from {medians[low]:.3f} ({low}) to "
            f"{medians[high]:.3f} ({high})"
        )
    else:
        claims.append(f"{name}: no difference between crystal systems is resolved ({figures})")
    return claims


def consistency(correlations: Sequence[Correlation]) -> str:
    """Say whether networks of one target agree on a descriptor.

    Returns:
        "the same" if all resolve a correlation of one sign, "contradictory" if two resolve opposite signs,
        else "not resolved by all".
    """
    signs = {math.copysign(1, one.rho) for one in correlations if one.resolved}
    if len(signs) == 2:
        return CONTRADICTORY
    return SAME if all(one.resolved for one in correlations) else "not resolved by all"


def _consistency(task: Sequence[Analysis]) -> Table:
    """Set the correlations of networks of one target beside one another."""
    columns = [
        Column("name", "descriptor"),
        *(Column(analysis.shares.name, analysis.shares.name, "+.2f") for analysis in task),
        Column("verdict", "sign"),
    ]
    rows = [
        {
            "name": LABELS[key],
            **{analysis.shares.name: analysis.correlations[key].rho for analysis in task},
            "verdict": consistency([analysis.correlations[key] for analysis in task]),
        }
        for key in task[0].correlations
    ]
    return Table(f"ρ in networks of one target, {task[0].shares.target or 'unnamed'}", columns, rows)


def _consistency_claim(task: Sequence[Analysis]) -> str:
    verdicts: dict[str, list[str]] = {SAME: [], CONTRADICTORY: []}
    for key in task[0].correlations:
        verdict = consistency([analysis.correlations[key] for analysis in task])
        verdicts.setdefault(verdict, []).append(LABELS[key])
    same, contradictory = ("; ".join(verdicts[name]) or "none" for name in (SAME, CONTRADICTORY))
    target = task[0].shares.target or "one target"
    return (
        f"{len(task)} networks of {target}: descriptors that go with the share in the same direction in all: "
        f"{same}. In opposite directions: {contradictory}"
    )


def _agreement_claim(pair: Agreement) -> str:
    one = pair.correlation
    if not one.resolved:
        verdict = "do not resolvably divide crystals alike"
    else:
        verdict = "divide crystals alike" if one.rho > 0 else "divide crystals the other way round"
    return (
        f"{pair.first} and {pair.second}, of one target, {verdict}: ρ = {one.rho:.2f} [{one.low:.2f}, "
        f"{one.high:.2f}], p = {one.p_value:.2g}, {one.count} crystals"
    )


def _warnings(analysis: Analysis) -> list[str]:
    shares, figures, warnings = analysis.shares, analysis.figures, []
    if analysis.state is not None:
        view = {"se3": "SE(3)", "so3": "SO(3)"}.get(analysis.state)
        where = "gives all crystals even shares" if analysis.state == EVEN else f"takes the {view} view alone"
        warnings.append(
            f"{shares.name}: the router stagnates, it {where} (share of the SO(3) view {figures[MEAN]:.3f} ± "
            f"{figures[SPREAD]:.3f}); correlations are with what little is left. Compare with "
            "model.fusion=concat and with one view (mgt-fast ablate)"
        )
    if shares.left_out:
        warnings.append(
            f"{shares.name}: {len(shares.left_out)} crystals were not predicted: {_listed(shares.left_out)}"
        )
    return warnings


def _listed(reasons: Mapping[str, str]) -> str:
    listed = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:_MOST_LISTED])
    return listed + "; ..." * (len(reasons) > _MOST_LISTED)


def _details(analysis: Analysis) -> dict[str, Any]:
    return {
        "target": analysis.shares.target,
        "unit": analysis.shares.unit,
        "crystals": len(analysis.shares.so3),
        "figures": analysis.figures,
        "stagnates": analysis.state,
        "correlations": analysis.correlations,
        "crystal_systems": {
            "test": analysis.systems,
            "groups": {
                name: {"count": len(group), "median": float(np.median(group))}
                for name, group in analysis.groups.items()
            },
        },
        "left_out": analysis.shares.left_out,
    }


def _records(analysis: Analysis, ids: Sequence[str]) -> list[dict[str, Any]]:
    shares = analysis.shares
    return [
        {
            "model": shares.name,
            "id": ids[index],
            "se3_contribution": 1 - float(shares.so3[i]),
            "so3_contribution": float(shares.so3[i]),
            "prediction": float(shares.prediction[i]),
            **{name: float(column[i]) for name, column in analysis.values.items()},
            "crystal_system": analysis.symmetry[i].system or "",
            "space_group": analysis.symmetry[i].space_group or "",
        }
        for i, index in enumerate(shares.indices.tolist())
    ]


def _overview(analyses: Sequence[Analysis]) -> Table:
    columns = [
        Column("model", "network"),
        Column("target", "target"),
        Column("count", "crystals", "d"),
        Column("mean", "mean", ".3f"),
        Column("sd", "sd", ".3f"),
        Column("median", "median", ".3f"),
        Column("most", "90 % in"),
        Column("one_view", "at one view", ".1%"),
    ]
    rows = [
        {
            "model": analysis.shares.name,
            "target": analysis.shares.target,
            "count": len(analysis.shares.so3),
            "mean": analysis.figures[MEAN],
            "sd": analysis.figures[SPREAD],
            "one_view": analysis.figures[ONE_VIEW],
            "median": float(np.median(analysis.shares.so3)),
            "most": "{:.2f} to {:.2f}".format(*np.quantile(analysis.shares.so3, (0.05, 0.95))),
        }
        for analysis in analyses
    ]
    return Table("Share of the SO(3) view in the predictions", columns, rows)


_CORRELATION = (
    Column("rho", "ρ", "+.2f"),
    Column("interval", f"{CONFIDENCE:.0%} interval"),
    Column("p_value", "p", ".2g"),
    Column("count", "crystals", "d"),
    Column("verdict", "verdict"),
)


def _correlation(one) -> dict[str, Any]:
    interval = None if math.isnan(one.rho) else f"{one.low:+.2f} to {one.high:+.2f}"
    verdict = "cannot be tested" if math.isnan(one.rho) else "resolved" if one.resolved else "not resolved"
    return {
        "rho": one.rho,
        "interval": interval,
        "p_value": one.p_value,
        "count": one.count,
        "verdict": verdict,
    }


def _correlations(analysis: Analysis) -> Table:
    rows = [{"name": LABELS[name], **_correlation(one)} for name, one in analysis.correlations.items()]
    title = f"{analysis.shares.name}: Spearman's ρ of the SO(3) view's share with"
    return Table(title, (Column("name", "descriptor"), *_CORRELATION), rows)


def _systems(analysis: Analysis) -> Table:
    columns = [
        Column("name", "crystal system"),
        Column("count", "crystals", "d"),
        Column("median", "median share of the SO(3) view", ".3f"),
        Column("quartiles", "quartiles"),
    ]
    rows = []
    for name, group in analysis.groups.items():
        low, median, high = np.quantile(group, (0.25, 0.5, 0.75))
        quartiles = f"{low:.3f} to {high:.3f}"
        rows.append({"name": name, "count": len(group), "median": float(median), "quartiles": quartiles})
    return Table(f"{analysis.shares.name}: by crystal system", columns, rows)


def _agreement(agreement: Sequence[Agreement]) -> Table:
    columns = [
        Column("first", "network"),
        Column("second", "network"),
        Column("same", "target"),
        *_CORRELATION,
    ]
    rows = [
        {
            "first": pair.first,
            "second": pair.second,
            "same": "the same" if pair.same_target else "another",
            **_correlation(pair.correlation),
        }
        for pair in agreement
    ]
    return Table("Do networks divide the same crystals alike?", columns, rows)
