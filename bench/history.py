"""What each recorded commit reached on a device: `python bench/history.py DEVICE` writes a table and a plot.

DEVICE is a folder of `results/history`; without it all are rendered. The figures are ratios, how many times
faster a fast path was than its rival in the same run: they can be compared between commits, times on machines
that others share cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib
from record import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

HISTORY = RESULTS / "history"
COLORS = 10  # of matplotlib's cycle; the next lines are dashed


def load(folder: Path) -> list[dict]:
    """Return a device's runs, oldest first.

    Raises:
        ValueError: if nothing is recorded for it.
    """
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    if not runs:
        known = ", ".join(sorted(path.name for path in folder.parent.glob("*") if path.is_dir())) or "none"
        raise ValueError(f"no history of {folder.name!r}; recorded devices: {known}")
    return sorted(runs, key=lambda run: (run["date"], run["commit"]))


def ratios(runs: list[dict]) -> dict[str, dict[str, list[float | None]]]:
    """Return the ratios by file and fast path, one a run, None where a run did not measure it."""
    names = {name for run in runs for name, entry in run["benchmarks"].items() if "ratio" in entry}
    found: dict[str, dict[str, list]] = {}
    for name in sorted(names):
        file, _, benchmark = name.partition("::")
        found.setdefault(file, {})[benchmark] = [run["benchmarks"].get(name, {}).get("ratio") for run in runs]
    return found


def table(runs: list[dict], found: dict[str, dict[str, list]]) -> str:
    """Markdown: a column a run, a line a fast path."""
    lines = [
        f"# {runs[-1]['device']}",
        "",
        "How many times faster a fast path is than its rival, timed in the same run.",
        "",
        "| | " + " | ".join(f"{run['date'].replace('T', ' ')}<br>`{run['commit']}`" for run in runs) + " |",
        "|---|" + "--:|" * len(runs),
    ]
    for file, benchmarks in found.items():
        lines.append(f"| **{file}** |" + " |" * len(runs))
        for name, values in benchmarks.items():
            cells = ("–" if value is None else f"{value:.2f}" for value in values)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = "; ".join(f"{package} {version}" for package, version in runs[-1]["versions"].items())
    return "\n".join([*lines, "", f"Versions of the last run: {versions}."])


def plot(runs: list[dict], found: dict[str, dict[str, list]], path: Path) -> None:
    """Draw one panel a file, ratios on a logarithmic axis over the runs."""
    rows = [max(3.0, 0.2 * len(benchmarks) + 0.6) for benchmarks in found.values()]
    figure, panels = plt.subplots(
        len(found),
        figsize=(12, sum(rows)),
        squeeze=False,
        sharex=True,
        height_ratios=rows,
        layout="constrained",
    )
    for axes, (file, benchmarks) in zip(panels[:, 0], found.items(), strict=True):
        for n, (name, values) in enumerate(benchmarks.items()):
            style = {"color": f"C{n % COLORS}", "linestyle": ("-", "--", ":", "-.")[n // COLORS % 4]}
            places = [place for place, value in enumerate(values) if value is not None]
            axes.plot(places, [values[p] for p in places], marker="o", markersize=4, label=name, **style)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(yscale="log", title=file, ylabel="times faster than the rival")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xticks(
        range(len(runs)), [f"{run['date'][:10]}\n{run['commit'][:8]}" for run in runs], fontsize=8
    )
    axes.set_xlim(-0.3, len(runs) - 0.7)
    figure.suptitle(runs[-1]["device"])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def render(folder: Path, output: Path) -> str:
    """Write `<device>-history.md` and `.png` to `output` and return the table.

    Raises:
        ValueError: if there is no history, or none of its runs timed a fast path with its rival.
    """
    runs = load(folder)
    found = ratios(runs)
    if not found:
        raise ValueError(f"no run in {folder} timed a fast path beside its rival")
    text = table(runs, found)
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{folder.name}-history.md"
    path.write_text(text + "\n")
    plot(runs, found, path.with_suffix(".png"))
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("devices", nargs="*", help="folders of results/history; default: all")
    parser.add_argument("--folder", type=Path, default=HISTORY, help="where the histories are")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for tables and plots")
    arguments = parser.parse_args(argv)
    devices = arguments.devices or sorted(path.name for path in arguments.folder.glob("*") if path.is_dir())
    try:
        for name in devices:
            print(render(arguments.folder / name, arguments.output))
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
