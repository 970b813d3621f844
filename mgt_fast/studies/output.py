"""What a study leaves in its folder: tables as Markdown, every figure as CSV and JSON, a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from ..data import CrystalDataset
from ..durable import make_folder, replace_file
from ..train.environment import describe_machine
from ..train.runlog import say
from ..train.setup import manifest_digest

MISSING = "–"


@dataclass(frozen=True)
class Column:
    """A column of a table: the key of its values, its heading, and their format, as ".4f"."""

    key: str
    label: str
    form: str = ""

    def text(self, row: Mapping[str, Any]) -> str:
        """Return a row's value as text; a dash where there is none."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return MISSING
        return format(value, self.form) if self.form and not isinstance(value, str) else str(value)


CERTAINTY = (
    Column("margin", "±", ".2g"),
    Column("p_seeds", "p, seeds", ".2g"),
    Column("p_crystals", "p, crystals", ".2g"),
)
"""What stands behind the difference of two arms; the values are those of `statistics.Comparison.columns`."""


@dataclass(frozen=True)
class Table:
    """Rows shown to the reader: a title, columns, and a mapping a row."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]

    def markdown(self) -> str:
        """Return the table as Markdown, without its title."""
        lines = [[column.label for column in self.columns], ["---"] * len(self.columns)]
        lines += [[column.text(row).replace("|", "\\|") for column in self.columns] for row in self.rows]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def rich(self) -> RichTable:
        """Return the table for a terminal; a narrow one wraps between words, and no number is cut."""
        table = RichTable(
            title=escape(self.title),
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for column in self.columns:
            words = " ".join([column.label, *map(column.text, self.rows)]).split()
            table.add_column(
                escape(column.label),
                justify="right" if column.form else "left",
                min_width=max(map(len, words), default=0),
            )
        for row in self.rows:
            table.add_row(*(escape(column.text(row)) for column in self.columns))
        return table


@dataclass(frozen=True)
class Report:
    """The outcome of a study.

    Attributes:
        study: its command, which names the files.
        title: one line for the reader.
        tables: what is shown.
        claims: sentences that say what was found, each with its uncertainty.
        warnings: sentences that say what is wrong, each with its figures and a remedy.
        notes: how the figures are to be read.
        records: raw figures, a mapping a run or crystal: the rows of the CSV file.
        settings: of the study.
        environment: from `environment`.
        details: further figures for the JSON file.
    """

    study: str
    title: str
    tables: Sequence[Table]
    records: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    claims: Sequence[str] = ()
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        """Return the report as Markdown."""
        parts = [f"# {self.title}"]
        parts += [f"**Warning**: {text}" for text in self.warnings]
        parts += [f"## {table.title}\n\n{table.markdown()}" for table in self.tables]
        if self.claims:
            parts.append("## What was found\n\n" + "\n".join(f"- {text}" for text in self.claims))
        parts += self.notes
        where = self.environment
        parts.append(
            f"{where['device']}, {where['date'][:10]}, mgt-fast {where['versions']['mgt-fast']}, torch "
            f"{where['versions']['torch']}; settings and every figure in {self.study}.json"
        )
        return "\n\n".join(parts) + "\n"


def write_report(
    folder: str | Path, report: Report, draw: Callable[[Path], None], console: Console
) -> dict[str, Path]:
    """Write a study's `.json`, `.csv`, `.md` and `.png` and show its tables.

    Args:
        folder: of the study; made if needed. What an earlier run of the study wrote is replaced.
        report: the outcome.
        draw: draws the picture at the path it is given.
        console: where tables, claims and warnings are shown.

    Returns:
        The paths by suffix, as "json".
    """
    folder = Path(folder)
    make_folder(folder)
    paths = {suffix: folder / f"{report.study}.{suffix}" for suffix in ("json", "csv", "md", "png")}
    replace_file(paths["json"], (json.dumps(plain(report), indent=2) + "\n").encode())
    replace_file(paths["csv"], _csv(report.records).encode())
    replace_file(paths["md"], report.markdown().encode())
    draw(paths["png"])
    for table in report.tables:
        console.print(table.rich(), crop=False)
        console.print()
    for text in report.claims:
        say(console, text)
    for text in report.warnings:
        say(console, f"warning: {text}")
    say(console, f"written: {', '.join(str(path) for path in paths.values())}")
    return paths


def environment(device: torch.device, datasets: Mapping[str, CrystalDataset]) -> dict[str, Any]:
    """Return where and on what a study ran: `describe_machine`, and "datasets" with their digests.

    Args:
        device: that it computed on.
        datasets: by what they are to the study, as "target".
    """
    return describe_machine(device) | {
        "datasets": {
            name: {"name": dataset.path.name, "crystals": len(dataset), "manifest": manifest_digest(dataset)}
            for name, dataset in datasets.items()
        }
    }


def plain(value: Any) -> Any:
    """Turn dataclasses, paths, arrays and numbers that are not finite into what JSON can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for record in records for name in record))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()
