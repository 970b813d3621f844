"""Drawing in SVG: elements whose texts are escaped, axes, and the frame of a chart.

Colours are classes of the page's style sheet, so that a chart follows its light and dark scheme.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH = 420
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 44  # margins of the plotting area


def element(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """Return an element; children and attributes that are not Markup are escaped.

    Args:
        name: of the element.
        children: its contents.
        attributes: a trailing underscore is dropped, another becomes a hyphen; None leaves one out, and
            floats are rounded to hundredths of a unit.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(Markup(key.rstrip("_").replace("_", "-")), _plain(value))
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, Markup("").join(children))


def _plain(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def number(value: float, digits: int = 4) -> str:
    """Return a number for the reader, with a minus sign and without needless zeros."""
    return f"{value:.{digits}g}".replace("-", "−").replace("e−0", "e−").replace("e+0", "e")


def decimals(scale: float) -> int:
    """Return after how many decimals a value of some size has three significant digits."""
    return 3 if not (np.isfinite(scale) and scale > 0) else int(np.clip(2 - np.floor(np.log10(scale)), 0, 9))


def fixed(value: float, places: int) -> str:
    """Return a number with so many decimals, for columns of numbers."""
    return f"{value:.{places}f}".replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """A map from values to coordinates.

    Attributes:
        low, high: values at the ends, low < high; both positive if `log`.
        start, end: their coordinates.
        log: of a logarithmic axis.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(
        cls, values: np.ndarray, start: float, end: float, *, log: bool = False, margin: float = 0.04
    ) -> Scale:
        """Return a scale that holds all finite values, with a margin (a fraction of the whole)."""
        finite = values[np.isfinite(values)]
        if log:
            finite = finite[finite > 0]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 2.0)
        if log:
            extra = (high / low) ** margin if high > low else 1.5
            return cls(low / extra, high * extra, start, end, True)
        extra = margin * (high - low) if high > low else max(abs(high), 1.0) / 10
        return cls(low - extra, high + extra, start, end)

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        """Return coordinates; NaN for what a logarithmic axis cannot show."""
        values = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.log(np.where(values > 0, values, np.nan))
            low, high = np.log(low), np.log(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6, integer: bool = False) -> np.ndarray:
        """Return round values within the scale."""
        if self.log:
            for subs in ((1.0,), (1.0, 2.0, 5.0), tuple(np.arange(1.0, 10.0))):
                ticks = self._within(
                    LogLocator(subs=subs, numticks=most + 2).tick_values(self.low, self.high)
                )
                if len(ticks) >= 3:
                    return ticks[:: -(-len(ticks) // most)]
        locator = MaxNLocator(most - 1, steps=[1, 2, 2.5, 5, 10], integer=integer)
        return self._within(locator.tick_values(self.low, self.high))

    def _within(self, ticks: np.ndarray) -> np.ndarray:
        slack = 1e-9 * (self.high - self.low)
        return ticks[(ticks >= self.low - slack) & (ticks <= self.high + slack)]


@dataclass(frozen=True)
class Frame:
    """The plotting area of a chart with its two axes."""

    x: Scale
    y: Scale
    height: int

    @classmethod
    def around(
        cls,
        x: np.ndarray,
        y: np.ndarray,
        height: int = 270,
        *,
        log_y: bool = False,
        margins: tuple[float, float] = (0.04, 0.06),
    ) -> Frame:
        """Return a frame that holds all points; `margins` of x and y are fractions of the whole."""
        return cls(
            Scale.over(x, LEFT, WIDTH - RIGHT, margin=margins[0]),
            Scale.over(y, height - BOTTOM, TOP, log=log_y, margin=margins[1]),
            height,
        )

    def drawing(
        self,
        name: str,
        x_label: str,
        y_label: str,
        contents: Iterable[Markup],
        *,
        integer_x: bool = False,
        data: str | None = None,
    ) -> Markup:
        """Return the whole drawing.

        Args:
            name: read out in place of the picture.
            x_label, y_label: of the axes, with units.
            contents: drawn over the grid.
            integer_x: label whole numbers alone.
            data: what the page's script shows at the pointer, as JSON.
        """
        left, right, top, bottom = self.x.start, self.x.end, self.y.end, self.y.start
        parts = []
        for value in self.y.ticks(5 if self.height < 250 else 6):
            at = float(self.y(value))
            parts.append(element("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
            parts.append(element("text", number(value), x=left - 7, y=at + 4, class_="tick end"))
        for value in self.x.ticks(6, integer_x):
            at = float(self.x(value))
            parts.append(element("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            parts.append(element("text", number(value), x=at, y=bottom + 17, class_="tick middle"))
        parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        parts.append(element("text", x_label, x=(left + right) / 2, y=self.height - 6, class_="label middle"))
        middle = (top + bottom) / 2
        parts.append(
            element(
                "text", y_label, x=11, y=middle, class_="label middle", transform=f"rotate(-90 11 {middle})"
            )
        )
        return picture(name, WIDTH, self.height, [*parts, *contents], data=data)


def picture(
    name: str, width: int, height: int, contents: Sequence[Markup], *, data: str | None = None
) -> Markup:
    """Return an SVG drawing with an accessible name."""
    return element(
        "svg",
        *contents,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=name,
        class_="chart",
        data_curve=data,
    )


def path(x: np.ndarray, y: np.ndarray) -> str:
    """Return a path's data through points, (n,) each; it is broken where a coordinate is not finite."""
    commands, pen_down = [], False
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if not (np.isfinite(px) and np.isfinite(py)):
            pen_down = False
            continue
        commands.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = True
    return "".join(commands)
