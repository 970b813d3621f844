"""The picture of a protocol: published errors, and ours with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..plots import COLORS, STYLE
from .recipe import Recipe

if TYPE_CHECKING:
    from .run import Score

_WIDE = 5  # errors farther apart than this ratio need a logarithmic axis


def plot_errors(path: Path, recipe: Recipe, score: Score) -> None:
    """Draw a line a model, its mean absolute error as a point, and write a PNG."""
    published = sorted(recipe.published, key=lambda one: -one.mae)
    names = [one.model for one in published]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 1.4 + 0.32 * (len(names) + 1)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        if published:
            axes.plot([one.mae for one in published], range(len(names)), "o", color="0.5", label="published")
        axes.errorbar(
            [score.mae],
            [len(names)],
            xerr=None if score.crystals.count < 2 else score.half_interval,
            fmt="o",
            capsize=3,
            color=COLORS["test"],
            label="mgt-fast, 95 % over test crystals",
        )
        errors = [one.mae for one in published] + [score.mae]
        if max(errors) > _WIDE * min(errors):
            axes.set_xscale("log")
        axes.set_yticks(range(len(names) + 1), [*names, "mgt-fast"])
        axes.set_ylim(-0.6, len(names) + 0.6)
        axes.set_xlabel(f"test MAE [{recipe.unit}]" if recipe.unit else "test MAE")
        axes.set_title(recipe.name, loc="left")
        figure.legend(loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=150)
