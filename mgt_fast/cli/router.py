"""What the views do: the router's shares, and which crystals each view can tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import BatchOption, DeviceOption, SplitFileOption, app, new_folder, out, reported_errors

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
    split_file: SplitFileOption = None,
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
            split_file=split_file,
            batch_size=batch_size,
            device=device,
        )


@app.command()
def completeness(
    model: ModelsOption = None,
    neighbors: Annotated[
        str, typer.Option("--neighbors", metavar="K,K,...", help="Numbers of neighbours to probe at.")
    ] = "12,25",
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,N,...", help="Of the networks of random weights.")
    ] = "0,1,2,3,4",
    output: StudyFolderOption = None,
) -> None:
    """Probe which views tell distinct crystals apart that distances, or one view, confuse.

    Thirteen pairs of crystals are embedded by networks of random weights in float64; with --model also by
    trained ones, whose predictions are compared. The report stands in completeness.json, .csv, .md and .png.
    """
    with reported_errors():
        from ..studies.completeness import completeness_study

        completeness_study(
            output or new_folder("completeness"),
            out,
            model or [],
            _numbers(neighbors, "--neighbors", 1),
            _numbers(seeds, "--seeds", 0),
        )


def _numbers(text: str, option: str, least: int) -> list[int]:
    """Turn "12,25" into [12, 25]."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"{option} {text}: expected different whole numbers from {least} on, as 12,25")
    return [int(part) for part in parts]
