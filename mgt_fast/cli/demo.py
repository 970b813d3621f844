"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import app, out, reported_errors


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs and pictures.")] = Path(
        "demo"
    ),
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="A.B=C", help="Override a key that both demo runs have; repeatable."
        ),
    ] = None,
) -> None:
    """Pretrain, fine-tune and predict on the bundled crystals, with pictures, in about five minutes.

    What an earlier demo left in the folder is replaced.
    """
    with reported_errors():
        from ..demo import run_demo

        run_demo(output, out, set_ or ())
