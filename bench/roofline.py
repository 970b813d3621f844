"""Where each kernel stands under the machine's roofs: a table and a picture.

    python bench/roofline.py bench/results/nvidia-h200.json    writes nvidia-h200-roofline.md and .png
    python bench/roofline.py --predict                         from the formulas alone, at the rates below

A kernel of so many FLOP per byte can at best run at min(product rate, intensity · bandwidth).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import costs
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).with_name("results")
DATASHEET = {"bf16": 989e12, "copy": 3.35e12}
"""H100 SXM: dense bfloat16 products and memory bandwidth, NVIDIA's data sheet."""
CHANNELS, EDGES, EDGES_PER_ATOM, EDGES_PER_CRYSTAL = 256, 100_000, 28, 307  # as in the bundled crystals
OPERATIONS = ("edge_attention", "node_attention", "tensor_product_1", "tensor_product_2",
              "rbf_embedding", "residual_norm", "segment_sum")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A kernel: what it does, and what it was measured or is predicted to reach."""

    operation: str
    direction: str
    precision: str
    channels: int
    seconds: float
    intensity: float
    tflops: float
    gbytes_per_s: float
    roof: str
    share: float


def measured_points(record: dict, rival: str = "triton") -> list[Point]:
    """Kernels of one backend in a device's record."""
    points = []
    for entry in record.values():
        if "operation" in entry and entry["rival"].startswith(f"{rival}-"):
            fields = {name: entry[name] for name in Point.__dataclass_fields__ if name in entry}
            points.append(Point(precision=entry["rival"].split("-")[1], seconds=entry["median_s"], **fields))
    order = {name: place for place, name in enumerate(OPERATIONS)}
    return sorted(points, key=lambda p: (p.channels, p.precision, order[p.operation], p.direction))


def predicted_points(ceilings: dict[str, float]) -> list[Point]:
    """Every kernel on its roof, in bfloat16."""
    sizes = costs.Sizes(EDGES // EDGES_PER_ATOM, EDGES, EDGES // EDGES_PER_CRYSTAL, channels=CHANNELS)
    rows = {"rbf_embedding": (3 * EDGES,), "residual_norm": (EDGES,), "segment_sum": (EDGES, sizes.num_atoms)}
    points = []
    for operation in OPERATIONS:
        cost_of = getattr(costs, operation)(sizes, *rows.get(operation, ()))
        for direction in ("forward", "backward"):
            cost = getattr(cost_of, direction)
            seconds = cost.floor(ceilings["bf16"], ceilings["copy"])
            tflops, gbytes_per_s = cost.flops / seconds / 1e12, cost.bytes / seconds / 1e9
            roof = cost.roof(ceilings["bf16"], ceilings["copy"])
            at_best = (seconds, cost.intensity, tflops, gbytes_per_s, roof, 1.0)
            points.append(Point(operation, direction, "bf16", CHANNELS, *at_best))
    return points


def table(points: list[Point], *, measured: bool) -> str:
    """Markdown, a line a kernel."""
    time = "time, µs" if measured else "least time, µs"
    head = f"| kernel | pass | C | precision | FLOP/byte | {time} | TFLOP/s | GB/s | nearer roof |"
    lines = [head + " share |" * measured, "|---|---|--:|---|--:|--:|--:|--:|---|" + "--:|" * measured]
    for p in points:
        line = (
            f"| {p.operation} | {p.direction} | {p.channels} | {p.precision} | {p.intensity:.1f} "
            f"| {p.seconds * 1e6:.0f} | {p.tflops:.1f} | {p.gbytes_per_s:.0f} | {p.roof} |"
        )
        lines.append(line + f" {p.share:.0%} |" * measured)
    return "\n".join(lines)


def picture(points: list[Point], ceilings: dict[str, float], title: str, path: Path) -> None:
    """Draw the kernels that have products under the roofs, on logarithmic axes."""
    points = [p for p in points if p.intensity > 0]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    intensity = np.geomspace(0.1, 2000, 200)
    for precision in sorted({p.precision for p in points}):
        rate = ceilings.get(precision, ceilings["bf16"])
        roof = np.minimum(rate, intensity * ceilings["copy"]) / 1e12
        axes.plot(intensity, roof, color="black", linewidth=1)
        axes.annotate(f"{precision} {rate / 1e12:.0f} TFLOP/s", (intensity[-1], roof[-1]), (0, 8),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    colors = {name: f"C{place}" for place, name in enumerate(OPERATIONS)}
    filled = {"forward": None, "backward": "none"}
    for p in points:
        size = 12 - OPERATIONS.index(p.operation)  # those that fall on one another stay visible
        style = {"color": colors[p.operation], "markersize": size, "markerfacecolor": filled[p.direction]}
        axes.plot(p.intensity, p.tflops, "o", **style)
    for operation in dict.fromkeys(p.operation for p in points):
        axes.plot([], [], "o", color=colors[operation], label=operation)
    for direction, face in filled.items():
        axes.plot([], [], "o", color="grey", markerfacecolor=face, label=direction)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=title)
    axes.annotate(f"{ceilings['copy'] / 1e12:.2f} TB/s", (0.3, 0.3 * ceilings["copy"] / 1e12), (0, 10),
                  textcoords="offset points", ha="center", fontsize=8)  # fmt: skip
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("record", nargs="?", type=Path, help="a device's file in bench/results")
    parser.add_argument("--predict", action="store_true", help="draw what the formulas allow on an H100")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the pictures")
    arguments = parser.parse_args(argv)
    if arguments.predict == (arguments.record is not None):
        parser.error("give a record, or --predict")
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.predict:
        points = predicted_points(DATASHEET)
        title = f"Predicted, not measured: upper bounds at an H100's data-sheet rates, bf16, C = {CHANNELS}"
        picture(points, DATASHEET, title, arguments.output / "roofline-predicted.png")
        print(table(points, measured=False))
        return
    record = json.loads(arguments.record.read_text())
    points = measured_points(record)
    if "ceilings" not in record or not points:
        parser.error(
            f"{arguments.record} holds no Triton kernels with ceilings: run bench/bench_kernels.py on a GPU"
        )
    text = table(points, measured=True)
    path = arguments.output / f"{arguments.record.stem}-roofline.md"
    path.write_text(text + "\n")
    widest = [p for p in points if p.channels == CHANNELS] or points
    title = f"{record['ceilings']['device']}, measured, C = {widest[0].channels}"
    picture(widest, record["ceilings"], title, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
