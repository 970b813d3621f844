"""The run folder: resolved configuration, metrics, TensorBoard events; and what the user sees meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoint import BEST, LAST
from .config import RunConfig, dump_config

CONFIG, METRICS, RESULTS, PREDICTIONS = "config.yaml", "metrics.jsonl", "results.json", "predictions.csv"
_TENSORBOARD = "tensorboard"


class RunLog:
    """Writes a run's records; use it as a context manager.

    Every record is a line of metrics.jsonl. On a terminal a progress bar shows the steps; elsewhere only
    whole lines are printed.
    """

    def __init__(self, folder: str | Path, config: RunConfig, console: Console, overwrite: bool = False):
        """Create the folder and write the resolved configuration.

        Args:
            folder: the run folder.
            config: the resolved configuration.
            console: where progress goes.
            overwrite: remove the run that the folder may already hold.

        Raises:
            FileExistsError: if the folder holds anything that a run writes and `overwrite` is false.
        """
        self.folder = Path(folder)
        self.console = console
        files = (CONFIG, METRICS, RESULTS, PREDICTIONS, BEST, LAST)
        held = [name for name in (*files, _TENSORBOARD) if (self.folder / name).exists()]
        if held and not overwrite:
            raise FileExistsError(
                f"{folder} already holds {', '.join(held)}; choose another folder or pass --overwrite"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / _TENSORBOARD, ignore_errors=True)
        (self.folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        self._metrics = (self.folder / METRICS).open("w", encoding="utf-8")
        self._tensorboard = _summary_writer(self.folder / _TENSORBOARD) if config.tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def record(self, epoch: int, values: dict[str, float]) -> None:
        """Append one epoch's numbers to metrics.jsonl (and to TensorBoard)."""
        self._metrics.write(json.dumps({"epoch": epoch, **values}) + "\n")
        self._metrics.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, epoch)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write the run's final figures as results.json."""
        (self.folder / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    def say(self, text: str) -> None:
        """Print one line."""
        say(self.console, text)

    def progress(self) -> Progress:
        """Return a progress bar, a context manager; it is silent where there is no terminal."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )


def say(console: Console, text: str) -> None:
    """Print one line as it is, never wrapped or coloured by its contents."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Read the records of a run folder's metrics.jsonl, oldest first."""
    with (Path(folder) / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _summary_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install 'mgt-fast[tensorboard]'"
        raise ImportError(f"tensorboard=true needs TensorBoard: {remedy}") from error
    return SummaryWriter(folder)
