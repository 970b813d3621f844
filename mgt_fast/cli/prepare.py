"""Preparing datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, WorkersOption, app, err, reported_errors


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Turn ["a=b", ...] into {"a": "b", ...}."""
    pairs = [text.partition("=") for text in texts or ()]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"{option} {key}{equals}{value}: expected NAME=VALUE")
    return {key: value for key, _, value in pairs}


@app.command()
def prepare(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Files, folders and archives, whose formats are recognised; prepared datasets; bundled."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Dataset folder to make.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Column to store, or COLUMN=NAME; repeatable. All numbers when absent."
        ),
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", "-u", metavar="NAME=UNIT", help="Unit of a target; repeatable."),
    ] = None,
    require_target: Annotated[
        str, typer.Option(help="Reject a record that lacks any (has none), all (lacks one) or none.")
    ] = "any",
    labels: Annotated[
        Path | None, typer.Option(help="id_prop.csv with the targets of CIF or POSCAR files.")
    ] = None,
    split_file: Annotated[
        Path | None,
        typer.Option(help="Parts (JSON {train: ids, ...} or csv with id, split); a split column serves too."),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Format of all files, not recognised.")
    ] = None,
    workers: WorkersOption = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Crystals a shard.")] = None,
    max_neighbors: Annotated[
        int, typer.Option(min=0, help="Count edges for runs with so many neighbours; 0: do not count.")
    ] = 25,
    overwrite: OverwriteOption = False,
) -> None:
    """Read crystals in many formats into one dataset; every record is stored or listed in rejects.csv."""
    with reported_errors():
        from ..data import prepare as run
        from ..data.store import DEFAULT_SHARD_SIZE

        targets = [text.partition("=") for text in target or ()]
        summary = run(
            inputs,
            output,
            targets={key: name or key for key, _, name in targets} or None,
            units=_pairs(unit, "--unit"),
            require_target=require_target,
            labels=labels,
            split_file=split_file,
            format=format_,
            workers=workers,
            shard_size=shard_size or DEFAULT_SHARD_SIZE,
            max_neighbors=max_neighbors or None,
            overwrite=overwrite,
            console=err,
        )
        typer.echo(str(summary))
        if not summary.stored:
            raise ValueError(f"no crystal was stored; {output / 'rejects.csv'} says why")
