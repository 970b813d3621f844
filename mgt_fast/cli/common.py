"""What the commands share: the application, options, and errors of the user's as one line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The Multi-view Graph Transformer for crystals: prepare data, train, predict.",
)
out, err = Console(), Console(stderr=True)
_debug = False

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", help="YAML file, or a packaged one: pretrain, finetune, demo_pretrain, ..."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="A.B=C", help="Override one key of the configuration; repeatable."),
]
FolderOption = Annotated[
    Path | None, typer.Option("--output", "-o", help="Run folder; runs/<command>-<time> when absent.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the output holds.")]
ModelOption = Annotated[Path, typer.Option("--model", "-m", help="Checkpoint file, or a run folder's best.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Crystals at a time.")]
SplitFileOption = Annotated[
    Path | None,
    typer.Option(help="Names the crystals of each part, in place of the dataset's own; as for prepare."),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in the output folder from its last saved state; begin it if there is none.",
    ),
]
ResumeFromOption = Annotated[
    str | None,
    typer.Option("--resume-from", metavar="STATE", help="Continue from this state, as step-000001200."),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", "-j", min=0, help="Processes that parse crystals; one a core when absent."),
]


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Set options of every command."""
    global _debug
    _debug = debug


@contextmanager
def reported_errors() -> Iterator[None]:
    """Print what is wrong with the user's input in one line instead of a traceback, and exit with 1."""
    from ..distributed import RankError
    from ..train.interrupt import RunStoppedError
    from ..train.loop import NonFiniteLossError

    expected = (ValueError, OSError, ImportError, NotImplementedError, NonFiniteLossError, RankError)
    try:
        yield
    except RunStoppedError as stopped:
        err.print(str(stopped), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(128 + (stopped.signal or 0)) from None
    except expected as error:
        if _debug:
            raise
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        raise typer.Exit(1) from None


def new_folder(command: str) -> Path:
    """Return the folder of a command that was given none, named by the time."""
    return Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"
