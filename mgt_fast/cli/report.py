"""The report of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import OverwriteOption, app, out, reported_errors


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of pretrain or finetune.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file; RUN/report.html when absent.")
    ] = None,
    overwrite: OverwriteOption = False,
    worst: Annotated[int, typer.Option(min=0, help="Crystals in the list of the worst predictions.")] = 12,
) -> None:
    """Show a run, finished or in progress, as one HTML page that needs no network.

    Curves, errors beside trivial predictors, the worst predictions with their crystals, the router's shares,
    throughput, configuration and environment.
    """
    with reported_errors():
        from ..report import write_report
        from ..train.runlog import REPORT, say

        say(out, f"written: {write_report(run, output or run / REPORT, worst=worst, overwrite=overwrite)}")
