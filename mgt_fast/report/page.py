"""The report as one HTML file that loads nothing: styles, script and drawings stand in it."""

from __future__ import annotations

import base64
import hashlib
import time
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..durable import replace_file
from .content import Section
from .crystals import open_dataset_of
from .record import RunRecord, read_run
from .sections import sections


@dataclass(frozen=True)
class Page:
    """What the template fills in."""

    kind: str
    title: str
    subtitle: str
    sections: list[Section]
    footer: str


def write_report(folder: str | Path, output: str | Path, *, worst: int = 12, overwrite: bool = False) -> Path:
    """Write the report of a run, which may be in progress.

    Args:
        folder: of the run.
        output: the HTML file.
        worst: crystals in the list of the worst predictions.
        overwrite: replace the file if it exists.

    Returns:
        The file.

    Raises:
        FileExistsError: if the file exists and `overwrite` is not set.
        FileNotFoundError: if its folder is missing.
        ValueError: as `record.read_run`.
    """
    run, output = read_run(folder), Path(output)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output}: there is no folder {output.parent}; make it first")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another name (--output) or pass --overwrite")
    replace_file(output, render(run, worst).encode())
    return output


def render(run: RunRecord, worst: int = 12) -> str:
    """Return the report of a run as HTML."""
    dataset, reason = open_dataset_of(run)
    kind = "fine-tuning" if run.finetunes else "pretraining"
    began = str((run.environment or {}).get("date") or "").replace("T", " ").replace("Z", " UTC")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    subtitle = f"Run folder {run.folder.resolve().name}" + (f", begun {began}" if began else "")
    page = Page(
        kind=f"mgt-fast · {kind} run",
        title=run.target.capitalize(),
        subtitle=subtitle,
        sections=sections(run, dataset, reason, worst),
        footer=f"Written by mgt-fast {version('mgt-fast')} from the files of the run folder, {written}.",
    )
    style, script = (_template(name) for name in ("report.css", "report.js"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_template("report.html.j2")).render(
        page=page,
        policy=_policy(style, script),
        version=version("mgt-fast"),
        style=Markup(style),
        script=Markup(script),
        zip=zip,
    )


def _template(name: str) -> str:
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Return a policy by which a browser runs and loads nothing but these two texts."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
