"""Protocols: published benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, WorkersOption, app, err, out, reported_errors

protocols = typer.Typer(
    no_args_is_help=True,
    help="Published benchmarks: official crystals, parts and settings, and the published errors beside ours.",
)
app.add_typer(protocols, name="protocol")

NameArgument = Annotated[str, typer.Argument(help="Protocol; `mgt-fast protocol list` names them.")]
_PREPARED = "Folder of the prepared protocol; protocols/<name> when absent."


def _prepared(name: str, folder: Path | None) -> Path:
    return Path("protocols") / name if folder is None else folder


@protocols.command("list")
def list_() -> None:
    """List the protocols."""
    with reported_errors():
        from ..protocols.describe import overview
        from ..protocols.recipe import load_recipes

        out.print(overview(load_recipes().values()))


@protocols.command()
def show(name: NameArgument) -> None:
    """Show a protocol: its files and where they are, parts, settings, published errors, what to cite."""
    with reported_errors():
        from ..protocols.describe import describe
        from ..protocols.recipe import find_recipe

        typer.echo(describe(find_recipe(name)))


@protocols.command()
def prepare(
    name: NameArgument,
    raw: Annotated[
        Path, typer.Option("--raw", help="Folder of the raw files; what is not there is fetched into it.")
    ] = Path("raw"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help=_PREPARED)] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing", help="Leave out crystals of the official parts that cannot be stored."
        ),
    ] = False,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a protocol's dataset and the files of its parts."""
    with reported_errors():
        from ..protocols.prepare import prepare_protocol
        from ..protocols.recipe import find_recipe

        prepared, summary = prepare_protocol(
            find_recipe(name),
            _prepared(name, output),
            raw,
            err,
            allow_missing=allow_missing,
            workers=workers,
            overwrite=overwrite,
        )
        if summary is not None:
            typer.echo(str(summary))
        for line in prepared.lines():
            typer.echo(line)
