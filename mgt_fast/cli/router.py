"""What the views do: the router's shares, and which crystals each view can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import BatchOption, DeviceOption, app, new_folder, out, reported_errors

ModelsOption = Annotated[
    list[Path] | None,
    typer.Option("--model", "-m", help="Checkpoint file, or a run folder's best; repeatable."),
]
StudyFolderOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder of the report; runs/<command>-<time> when absent."),
]


@app.command()
def router(
    model: ModelsOption = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", "-d", help="Prepared dataset; the bundled one when absent.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, val, test or all.")] = "test",
    output: StudyFolderOption = None,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Report each view's contribution to the predictions, and what it goes with in the crystals.

    Give one network a task, or several of one task (--model, repeatable) to see whether they agree. The
    report stands in router.json, .csv (a line a crystal), .md and .png.
    """
    with reported_errors():
        from ..studies.router import router_study

        router_study(
            model or [],
            output or new_folder("router"),
            out,
            dataset,
            split,
            batch_size=batch_size,
            device=device,
        )
