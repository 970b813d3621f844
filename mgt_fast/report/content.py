"""What the template fills in: sections with texts, tables and charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .charts import Chart
from .crystals import CrystalFacts
from .notices import Notice


@dataclass(frozen=True)
class Column:
    """A column's heading, and its class in the style sheet: "number", "name" or none."""

    label: str
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; `name` is read out and, of a folded table, shown."""

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Headline:
    """The figure that a reader wants first, with what it means and what stands beside it."""

    label: str
    value: str
    unit: str
    explanation: str
    charts: Sequence[Chart]


@dataclass(frozen=True)
class DrawnCrystal:
    """A crystal of the gallery."""

    rank: int
    id: str
    error: str
    facts: CrystalFacts


@dataclass(frozen=True)
class Section:
    """A section; what it has not is left out of the page.

    `id` is its anchor; charts in `pairs` are larger than `charts`.
    """

    id: str
    title: str
    headline: Headline | None = None
    paragraphs: Sequence[str] = ()
    notices: Sequence[Notice] = ()
    facts: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    crystals: Sequence[DrawnCrystal] = ()
    charts: Sequence[Chart] = ()
    pairs: Sequence[Chart] = ()
    folded: Sequence[Table] = ()
