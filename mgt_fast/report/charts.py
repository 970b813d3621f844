"""The report's charts: curves, parity, histograms, bars. What has too many points is thinned, and says so."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from .svg import BOTTOM, LEFT, RIGHT, TOP, WIDTH, Frame, Scale, element, number, path, picture

MOST_DOTS = 1200
"""Points that are drawn one by one; of more, the number in each cell of a grid is shown."""
_MARKED = 40  # points of a curve that has a mark at each
_CELL = 4.0  # coordinates


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: in the legend.
        x, y: (n,).
        style: class of the style sheet, as "train".
        low, high: of a band around the line, (n,), or None.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Chart:
    """A drawing with what stands around it.

    Attributes:
        title: above it.
        drawing: the SVG element.
        legend: style and name of each curve.
        note: below it.
        interactive: whether the page's script shows values at the pointer.
    """

    title: str
    drawing: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    interactive: bool = False


def curves(
    title: str,
    lines: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    best: float | None = None,
    reference: tuple[float, str] | None = None,
    linear: bool = False,
    note: str = "",
) -> Chart:
    """Draw lines over epochs or steps; the axis is logarithmic where values span more than a decade.

    Args:
        title, x_label, y_label, note: texts.
        lines: at least one.
        best: where a vertical line marks the best epoch.
        reference: height and name of a horizontal line.
        linear: do not make the axis logarithmic.
    """
    values = np.concatenate(
        [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    )
    values = values[np.isfinite(values)]
    if reference is not None:
        values = np.append(values, reference[0])
    log = not linear and bool(values.size) and values.min() > 0 and values.max() > 10 * values.min()
    frame = Frame.around(np.concatenate([line.x for line in lines]), values, log_y=log, margins=(0.03, 0.06))
    contents, legend = [], []
    if best is not None:
        at = float(frame.x(best))
        contents.append(element("line", x1=at, x2=at, y1=frame.y.start, y2=frame.y.end, class_="mark"))
        legend.append(("mark", f"best epoch, {best:g}"))
    if reference is not None:
        at = float(frame.y(reference[0]))
        contents.append(element("line", x1=frame.x.start, x2=frame.x.end, y1=at, y2=at, class_="reference"))
        legend.append(("reference", f"{reference[1]}, {number(reference[0])}"))
    for line in lines:
        x = frame.x(line.x)
        if line.low is not None:
            sound = np.isfinite(frame.y(line.low)) & np.isfinite(frame.y(line.high))
            around = np.concatenate([x[sound], x[sound][::-1]])
            edge = np.concatenate([frame.y(line.high)[sound], frame.y(line.low)[sound][::-1]])
            contents.append(element("path", d=path(around, edge), class_=f"band {line.style}"))
        y = frame.y(line.y)
        contents.append(element("path", d=path(x, y), class_=f"line {line.style}"))
        if len(line.x) <= _MARKED:
            contents += [
                element("circle", cx=px, cy=py, r=2.6, class_=f"dot {line.style}")
                for px, py in zip(x.tolist(), y.tolist(), strict=True)
                if np.isfinite(py)
            ]
    if [line.name for line in lines] != [y_label]:
        legend = [(line.style, line.name) for line in lines] + legend
    ends = "; ".join(_last(line) for line in lines)
    drawing = frame.drawing(
        f"{title}: {ends}", x_label, y_label, contents, integer_x=True, data=_readout(frame, lines, x_label)
    )
    return Chart(title, drawing, legend, note, interactive=True)


def _last(line: Curve) -> str:
    finite = line.y[np.isfinite(line.y)]
    if not finite.size:
        return f"{line.name} has no finite value"
    return f"{line.name} from {number(finite[0])} to {number(finite[-1])}"


def _readout(frame: Frame, lines: Sequence[Curve], x_label: str) -> str:
    """Return what the script shows at the pointer: coordinates and texts of every place on the x axis."""
    places = np.unique(np.concatenate([line.x for line in lines]))
    values = {line.name: dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for line in lines}
    texts = [
        ", ".join(
            [f"{x_label} {x:g}"]
            + [f"{name} {number(found[x])}" for name, found in values.items() if x in found]
        )
        for x in places.tolist()
    ]
    return json.dumps({"at": [round(at, 1) for at in frame.x(places).tolist()], "text": texts})


def parity(
    title: str, reference: np.ndarray, prediction: np.ndarray, ids: Sequence[str], style: str, unit: str
) -> Chart:
    """Draw predictions over references, (n,) each, both axes alike."""
    both = np.concatenate([reference, prediction])
    height = WIDTH - LEFT - RIGHT + TOP + BOTTOM
    frame = Frame.around(both, both, height, margins=(0.04, 0.04))
    (x0, x1), (y0, y1) = (frame.x.start, frame.x.end), (frame.y.start, frame.y.end)
    contents = [element("line", x1=x0, x2=x1, y1=y0, y2=y1, class_="reference")]
    names = (
        f"{name}: reference {number(a)}, predicted {number(b)}"
        for name, a, b in zip(ids, reference.tolist(), prediction.tolist(), strict=True)
    )
    dots, note = _dots(frame, reference, prediction, names, style)
    mae = np.abs(prediction - reference).mean()
    name = (
        f"{title}: predicted over reference values of {len(reference)} crystals, MAE {number(mae, 3)}{unit}"
    )
    suffix = f" ({unit.strip()})" if unit else ""
    drawing = frame.drawing(name, f"reference{suffix}", f"predicted{suffix}", [*contents, *dots])
    return Chart(title, drawing, note=note)


def scatter(
    title: str, x: np.ndarray, y: np.ndarray, ids: Sequence[str], x_label: str, y_label: str, style: str
) -> Chart:
    """Draw shares, from 0 to 1, over values."""
    frame = Frame(Scale.over(x, LEFT, WIDTH - RIGHT), Scale(-0.02, 1.02, 270 - BOTTOM, TOP), 270)
    names = (f"{name}: {number(a)}, {b:.3f}" for name, a, b in zip(ids, x.tolist(), y.tolist(), strict=True))
    dots, note = _dots(frame, x, y, names, style)
    return Chart(title, frame.drawing(f"{title}, {len(x)} crystals", x_label, y_label, dots), note=note)


def _dots(frame: Frame, x: np.ndarray, y: np.ndarray, names, style: str) -> tuple[list[Markup], str]:
    """Return a dot a crystal, or the number of crystals in the cells of a grid; and what to say of it."""
    px, py = frame.x(x), frame.y(y)
    if len(x) <= MOST_DOTS:
        dots = [
            element("circle", element("title", name), cx=a, cy=b, r=2.8, class_=f"dot {style} faint")
            for a, b, name in zip(px.tolist(), py.tolist(), names, strict=True)
        ]
        return dots, "A dot a crystal; its name shows at the pointer."
    columns, rows = np.floor(px / _CELL).astype(int), np.floor(py / _CELL).astype(int)
    cells, counts = np.unique(np.stack([columns, rows], 1), axis=0, return_counts=True)
    shade = 0.2 + 0.8 * np.log(counts) / max(np.log(counts.max()), 1e-9)
    squares = [
        element(
            "rect",
            x=column * _CELL,
            y=row * _CELL,
            width=_CELL,
            height=_CELL,
            class_=f"cell {style}",
            fill_opacity=float(opacity),
        )
        for (column, row), opacity in zip(cells.tolist(), shade.tolist(), strict=True)
    ]
    return squares, f"Shade: number of crystals in a cell, on a logarithmic scale, up to {counts.max():,}."


def histogram(
    title: str,
    values: np.ndarray,
    edges: np.ndarray,
    x_label: str,
    style: str,
    *,
    centre: float | None = None,
    height: int = 200,
) -> Chart:
    """Draw how many values lie between edges, (k + 1,); those outside count in the outermost bars.

    Args:
        title, x_label: texts.
        values: (n,).
        edges: of the bars, ascending.
        style: class of the style sheet.
        centre: where a vertical line stands.
        height: of the drawing.
    """
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    beyond = int(((values < edges[0]) | (values > edges[-1])).sum())
    frame = Frame(
        Scale(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT),
        Scale(0.0, max(1.0, 1.06 * float(counts.max(initial=0))), height - BOTTOM, TOP),
        height,
    )
    left, right, top = frame.x(edges[:-1]), frame.x(edges[1:]), frame.y(counts)
    bars = [
        element(
            "rect",
            element("title", f"{number(low, 3)} to {number(high, 3)}: {count}"),
            x=a + 0.5,
            y=t,
            width=b - a - 1,
            height=frame.y.start - t,
            class_=f"bar {style}",
        )
        for a, b, t, low, high, count in zip(
            *(part.tolist() for part in (left, right, top, edges[:-1], edges[1:], counts)), strict=True
        )
        if count
    ]
    if centre is not None:
        at = float(frame.x(centre))
        bars.append(element("line", x1=at, x2=at, y1=frame.y.start, y2=frame.y.end, class_="mark"))
    drawing = frame.drawing(f"{title}, {len(values)} crystals", x_label, "crystals", bars)
    note = f"{beyond} values beyond the axis count in the outermost bars." if beyond else ""
    return Chart(title, drawing, note=note)


def bars(title: str, values: Mapping[str, tuple[float, str, str]]) -> Chart:
    """Draw a bar a name; each has a value from 0, its text, and a style."""
    widest = max((value for value, _, _ in values.values()), default=0.0) or 1.0
    contents = []
    for row, (name, (value, text, style)) in enumerate(values.items()):
        y = 44 * row
        contents += [
            element("text", name, x=0, y=y + 13, class_="label"),
            element("text", text, x=WIDTH, y=y + 13, class_="label end strong"),
            element("rect", x=0, y=y + 19, width=WIDTH, height=12, rx=3, class_="track"),
            element(
                "rect",
                x=0,
                y=y + 19,
                width=max(2.0, WIDTH * value / widest),
                height=12,
                rx=3,
                class_=f"bar {style}",
            ),
        ]
    spoken = "; ".join(f"{name} {text}" for name, (_, text, _) in values.items())
    return Chart(title, picture(f"{title}: {spoken}", WIDTH, 44 * len(values) - 8, contents))
