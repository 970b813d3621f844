"""Pictures of a run: loss curves, parity of predictions, and the router's shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Colour-blind safe (Okabe and Ito): train, val, test.
COLORS = {"train": "#0072B2", "val": "#E69F00", "test": "#009E73"}
PALETTE = (*COLORS.values(), "#D55E00", "#CC79A7", "#56B4E9")
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _figure(width: float, height: float, columns: int = 1):
    """Return a figure bound to the file backend, and its axes; no global state is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def plot_curves(
    path: str | Path,
    records: Sequence[Mapping[str, float]],
    panels: Mapping[str, tuple[str, ...]],
    references: Mapping[str, tuple[float, str]] | None = None,
) -> None:
    """Draw metrics over epochs, a panel a kind, and write a PNG.

    Args:
        path: the picture.
        records: lines of metrics.jsonl.
        panels: axis label to the metrics drawn in it; a name's first word ("train", "val") is its part.
        references: axis label to a value drawn as a dashed line, and its name.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _figure(4.2 * len(panels), 3.2, len(panels))
        epochs = [record["epoch"] for record in records]
        for ax, (label, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                part = name.partition("_")[0]
                ax.plot(
                    epochs, [record[name] for record in records], color=COLORS[part], marker=".", label=part
                )
            if references and label in references:
                value, text = references[label]
                ax.axhline(value, color="0.5", linestyle="--", linewidth=1, label=text)
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            low, high = ax.dataLim.intervaly
            if high > 8 * low > 0:
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                ax.yaxis.set_major_formatter("{x:g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            ax.legend()
        figure.savefig(path, dpi=150)


def plot_parity(
    path: str | Path, parts: Mapping[str, tuple[np.ndarray, np.ndarray]], quantity: str, unit: str | None
) -> None:
    """Draw predictions over targets, and write a PNG.

    Args:
        path: the picture.
        parts: part name to its targets and predictions, (n,) each.
        quantity, unit: what is predicted.
    """
    suffix = f" ({unit})" if unit else ""
    with mpl.rc_context(STYLE):
        figure, (ax,) = _figure(4.4, 4.2)
        both = np.concatenate([np.concatenate(pair) for pair in parts.values()])
        low, high = both.min(), both.max()
        margin = 0.04 * (high - low)
        limits = (low - margin, high + margin)
        ax.plot(limits, limits, color="0.6", linewidth=1, zorder=0)
        for name, (target, prediction) in parts.items():
            mae = np.abs(target - prediction).mean()
            label = f"{name}: MAE {mae:.3g}{' ' + unit if unit else ''} (n = {len(target)})"
            ax.scatter(target, prediction, s=9, alpha=0.6, linewidths=0, color=COLORS[name], label=label)
        words = quantity.replace("_", " ")
        ax.set(
            xlim=limits,
            ylim=limits,
            aspect="equal",
            xlabel=f"{words}{suffix}, reference",
            ylabel=f"{words}{suffix}, predicted",
        )
        ax.legend(loc="upper left")
        figure.savefig(path, dpi=150)


def plot_router(
    path: str | Path, so3_share: np.ndarray, target: np.ndarray, quantity: str, unit: str | None
) -> None:
    """Draw how much of each prediction the router takes from the SO(3) view, and write a PNG.

    Args:
        path: the picture.
        so3_share: the SO(3) view's contribution, (n,), in [0, 1]; the SE(3) view has the rest.
        target: the crystals' targets, (n,).
        quantity, unit: what is predicted.
    """
    suffix = f" ({unit})" if unit else ""
    with mpl.rc_context(STYLE):
        figure, (left, right) = _figure(8.0, 3.2, 2)
        left.hist(so3_share, bins=np.linspace(0, 1, 26), color=COLORS["train"])
        left.axvline(0.5, color="0.5", linestyle="--", linewidth=1)
        left.set(xlabel="← SE(3) view    share of the SO(3) view →", ylabel="crystals", xlim=(0, 1))
        right.scatter(target, so3_share, s=9, alpha=0.6, linewidths=0, color=COLORS["train"])
        right.axhline(0.5, color="0.5", linestyle="--", linewidth=1)
        right.set(
            xlabel=f"{quantity.replace('_', ' ')}{suffix}, reference",
            ylabel="share of the SO(3) view",
            ylim=(0, 1),
        )
        figure.savefig(path, dpi=150)


def plot_spread(
    path: str | Path,
    x_label: str | None,
    x: Sequence[str] | Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
) -> None:
    """Draw every run's value as a point beside the mean of its arm, and write a PNG.

    Args:
        path: the picture.
        x_label: what changes along the axis.
        x: names, or numbers above 0 on a logarithmic axis, where lines join the means.
        panels: axis label to the series by name; for each x a series has its runs' values.
    """
    numeric = not any(isinstance(value, str) for value in x)
    order = np.argsort(x).tolist() if numeric else range(len(x))  # lines go from left to right
    x = [x[i] for i in order]
    with mpl.rc_context(STYLE):
        figure, axes = _figure(max(4.4, 0.9 * len(x) + 1.2) * len(panels), 3.4, len(panels))
        for ax, (label, series) in zip(axes, panels.items(), strict=True):
            for number, (name, found) in enumerate(series.items()):
                values = [found[i] for i in order]
                color = PALETTE[number % len(PALETTE)]
                shift = 0.0 if numeric else 0.22 * (number - (len(series) - 1) / 2)
                places = x if numeric else [place + shift for place in range(len(x))]
                for place, runs in zip(places, values, strict=True):
                    ax.plot([place] * len(runs), runs, "o", color=color, alpha=0.45, markersize=4)
                means = [np.mean(runs) for runs in values]
                line = "-" if numeric else "none"
                ax.plot(places, means, color=color, linestyle=line, marker="_", markersize=14, label=name)
            if numeric:
                ax.set_xscale("log")
                ax.set_xticks(x, [f"{value:g}" for value in x])
                ax.xaxis.set_minor_formatter(NullFormatter())
            else:
                ax.set_xticks(range(len(x)), x)
            ax.set(xlabel=x_label, ylabel=label)
            if len(series) > 1:
                ax.legend()
        figure.savefig(path, dpi=150)
