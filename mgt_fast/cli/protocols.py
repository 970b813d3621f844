"""Protocols: published benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, SetOption, WorkersOption, app, err, out, reported_errors

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


@protocols.command()
def run(
    name: NameArgument,
    data: Annotated[Path | None, typer.Option("--data", "-d", help=_PREPARED)] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Pretrained checkpoint or run folder; scratch when absent.")
    ] = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Which of the protocol's settings: published, small, ...")
    ] = "published",
    set_: SetOption = None,
    fold: Annotated[
        list[int] | None, typer.Option("--fold", help="Run this fold alone; repeatable. All when absent.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0,1,2", help="Seeds to run; the settings' when absent.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the runs; runs/protocol-<name> when absent."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what each run says.")] = False,
) -> None:
    """Fine-tune on every fold of a prepared protocol; print our test error beside the published ones.

    The same command in the same folder goes on where it was stopped. It leaves protocol.json, .csv, .md and
    .png.
    """
    with reported_errors():
        from ..protocols.recipe import find_recipe
        from ..protocols.run import run_protocol

        run_protocol(
            find_recipe(name),
            _prepared(name, data),
            output or Path("runs") / f"protocol-{name}",
            out,
            variant=recipe,
            overrides=set_ or (),
            start=start,
            folds=fold,
            seeds=_numbers(seeds),
            verbose=verbose,
        )


def _numbers(text: str | None) -> list[int] | None:
    """Turn "0,1,2" into [0, 1, 2]."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: expected whole numbers with commas between them") from None
