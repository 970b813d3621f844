"""Tables, claims and picture of the completeness probe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..plots import STYLE
from .output import Column, Report, Table

if TYPE_CHECKING:
    from .completeness import Finding, ModelFinding, Separation

STUDY = "completeness"
BASELINES = {
    "pairs": "pair distances",
    "atoms": "each atom's distances",
    "refinement": "any network of distances",
}
VIEWS = {"se3": "SE(3) view", "so3": "SO(3) view"}
CONFUSED = "confused"
_NOTES = (
    "A number is the median over initialisations of the relative distance |a − b| / |a| of the crystals' "
    "embeddings in float64, where it exceeds a hundred times what descriptions of one crystal differ by; "
    "otherwise the pair is confused. Distances marked * are below the resolution of float32: a network in "
    "float32 separates such a pair only if training amplifies the difference. Mirror images have equal "
    "energies; a network that predicts those loses nothing by confusing them.",
)


def report_on(
    findings: Sequence[Finding],
    of_models: Sequence[ModelFinding],
    settings: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Report:
    """Put what was found into words and tables.

    Args:
        findings: of each pair and number of neighbours.
        of_models: of each trained network and pair.
        settings, environment: of the study; see `Report`.
    """
    counts = list(dict.fromkeys(finding.max_neighbors for finding in findings))
    names = list(dict.fromkeys(finding.model for finding in of_models))
    by_count = {count: [f for f in findings if f.max_neighbors == count] for count in counts}
    by_model = {name: [f for f in of_models if f.model == name] for name in names}
    return Report(
        study=STUDY,
        title="Which views tell distinct crystals apart",
        tables=[
            *(_table(count, found) for count, found in by_count.items()),
            *(_model_table(found) for found in by_model.values()),
        ],
        records=[*(_record(finding) for finding in findings), *map(_model_record, of_models)],
        settings=settings,
        environment=environment,
        claims=[
            *(claim for count, found in by_count.items() for claim in _claims(count, found)),
            *(_model_claim(found) for found in by_model.values()),
        ],
        notes=[*_NOTES, _reasons(by_count[counts[0]])],
        details={"findings": [_details(f) for f in findings], "models": [_details(f) for f in of_models]},
    )


def draw(path: str | Path, findings: Sequence[Finding]) -> None:
    """Draw which method separates which pair, and by how much, a panel a number of neighbours."""
    counts = list(dict.fromkeys(finding.max_neighbors for finding in findings))
    pairs = list(dict.fromkeys(finding.pair.name for finding in findings))
    columns = [*BASELINES.values(), *VIEWS.values()]
    with mpl.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(3.2 + 3.4 * len(counts), 1.9 + 0.34 * len(pairs)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(counts), squeeze=False, sharey=True)[0]
        for ax, count in zip(panels, counts, strict=True):
            shown = np.full((len(pairs), len(columns)), np.nan)
            for finding in findings:
                if finding.max_neighbors == count:
                    shown[pairs.index(finding.pair.name)] = _strengths(finding)
            image = ax.imshow(
                np.where(shown < 0, shown, np.nan), cmap="viridis", vmin=-12, vmax=0, aspect="auto"
            )
            for row, column in np.argwhere(~(shown < 0)):
                mark, color = ("×", "#D55E00") if np.isnan(shown[row, column]) else ("✓", "0.4")
                ax.text(column, row, mark, ha="center", va="center", color=color, fontweight="bold")
            ax.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=8)
            ax.set_yticks(range(len(pairs)), pairs, fontsize=8)
            ax.tick_params(length=0)
            ax.set_title(f"{count} neighbours")
        bar = figure.colorbar(image, ax=panels, shrink=0.8)
        bar.set_label("log₁₀ relative distance\n×: confused   ✓: separated")
        figure.savefig(path, dpi=150)


def _strengths(finding: Finding) -> list[float]:
    """Return log10 of the views' distances, 0 for a baseline that separates, NaN for what confuses."""
    baselines = [0.0 if finding.baselines[name] else math.nan for name in BASELINES]
    views = [finding.views[name] for name in VIEWS]
    return baselines + [
        math.log10(view.median) if view.verdict == "separated" else math.nan for view in views
    ]


def _text(view: Separation | None) -> str | None:
    if view is None:
        return None
    if view.verdict == CONFUSED:
        return CONFUSED
    number = f"{view.median:.0e}{'*' if view.faint else ''}"
    return number if view.verdict == "separated" else f"undecided ({number})"


def _either(views: Mapping[str, Separation]) -> str:
    """Whether the views together separate a pair: if one does."""
    best = max(views.values(), key=lambda view: (view.verdict == "separated", view.median))
    return _text(best)


def _table(count: int, findings: Sequence[Finding]) -> Table:
    columns = [
        Column("pair", "pair"),
        Column("neighbors", "neighbours"),
        *(Column(name, label) for name, label in BASELINES.items()),
        *(Column(name, label) for name, label in VIEWS.items()),
        Column("both", "both views"),
    ]
    rows = [
        {
            "pair": finding.pair.name,
            "neighbors": _neighbors(finding),
            **{name: "separated" if finding.baselines[name] else CONFUSED for name in BASELINES},
            **{name: _text(finding.views[name]) for name in VIEWS},
            "both": _either(finding.views),
        }
        for finding in findings
    ]
    return Table(f"Graphs of {count} neighbours", columns, rows)


def _neighbors(finding: Finding) -> str:
    first, second = (f"{mean:.3g}" for mean in finding.neighbors)
    return first if first == second else f"{first}, {second}"


def _model_table(findings: Sequence[ModelFinding]) -> Table:
    first = findings[0]
    columns = [
        Column("pair", "pair"),
        Column("first", "first", ".6g"),
        Column("second", "second", ".6g"),
        Column("difference", "difference", ".2g"),
        Column("separated", "predictions"),
        *(Column(name, VIEWS[name]) for name in first.views),
    ]
    rows = [
        {
            "pair": finding.pair.name,
            "first": finding.predictions[0],
            "second": finding.predictions[1],
            "difference": finding.predictions[0] - finding.predictions[1],
            "separated": "separated" if finding.separated else CONFUSED,
            **{name: _text(view) for name, view in finding.views.items()},
        }
        for finding in findings
    ]
    unit = f", {first.unit}" if first.unit else ""
    return Table(f"{first.model}: {first.target or 'prediction'}{unit}", columns, rows)


def _claims(count: int, findings: Sequence[Finding]) -> list[str]:
    """Say which pairs each method confuses."""
    total = len(findings)
    confused = {
        **{
            label: [f.pair.name for f in findings if not f.baselines[name]]
            for name, label in BASELINES.items()
        },
        **{
            f"the {label}": [f.pair.name for f in findings if f.views[name].verdict == CONFUSED]
            for name, label in VIEWS.items()
        },
        "both views together": [
            f.pair.name for f in findings if all(view.verdict == CONFUSED for view in f.views.values())
        ],
    }
    claims = []
    for method, names in confused.items():
        verb = "confuses" if method.startswith(("the", "any")) else "confuse"
        listed = f": {', '.join(names)}" if names else ""
        claims.append(f"{count} neighbours: {method} {verb} {len(names)} of {total} pairs{listed}")
    return claims


def _model_claim(findings: Sequence[ModelFinding]) -> str:
    confused = [finding.pair.name for finding in findings if not finding.separated]
    listed = f": {', '.join(confused)}" if confused else ""
    return f"{findings[0].model}: equal predictions for {len(confused)} of {len(findings)} pairs{listed}"


def _reasons(findings: Sequence[Finding]) -> str:
    lines = [f"- {f.pair.name}: {f.pair.why} ({f.pair.source})" for f in findings]
    return "## What the pairs have in common\n\n" + "\n".join(lines)


def _views(views: Mapping[str, Separation]) -> dict[str, Any]:
    record = {}
    for name, view in views.items():
        record |= {
            f"{name}_verdict": view.verdict,
            f"{name}_distance": view.median,
            f"{name}_smallest": min(view.distances),
            f"{name}_largest": max(view.distances),
            f"{name}_threshold": view.threshold,
        }
    return record


def _record(finding: Finding) -> dict[str, Any]:
    return {
        "network": "random",
        "pair": finding.pair.name,
        "max_neighbors": finding.max_neighbors,
        **{name: "separated" if finding.baselines[name] else CONFUSED for name in BASELINES},
        **_views(finding.views),
    }


def _model_record(finding: ModelFinding) -> dict[str, Any]:
    return {
        "network": finding.model,
        "pair": finding.pair.name,
        "max_neighbors": finding.max_neighbors,
        **_views(finding.views),
        "prediction_first": finding.predictions[0],
        "prediction_second": finding.predictions[1],
        "prediction_rounding": finding.rounding,
    }


def _details(finding: Finding | ModelFinding) -> dict[str, Any]:
    """Return a finding for JSON, with its raw distances."""
    record = _record(finding) if hasattr(finding, "baselines") else _model_record(finding)
    record["distances"] = {name: view.distances for name, view in finding.views.items()}
    return record | {"why": finding.pair.why, "source": finding.pair.source, "mirror": finding.pair.mirror}
