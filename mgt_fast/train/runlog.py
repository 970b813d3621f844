"""The run folder: resolved configuration, metrics, TensorBoard events; and what the user sees meanwhile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoint import BEST, LAST, CheckpointError
from ..durable import explained, remove_leftovers, replace_file, write_all
from .config import ConfigError, RunConfig, dump_config, load_config
from .environment import ENVIRONMENT
from .lock import FolderLock
from .runstate import CHECKPOINTS, StateStore

CONFIG, METRICS, STEPS = "config.yaml", "metrics.jsonl", "steps.jsonl"
RESULTS, PREDICTIONS = "results.json", "predictions.csv"
REPORT = "report.html"
_FILES = (CONFIG, ENVIRONMENT, METRICS, STEPS, RESULTS, PREDICTIONS, BEST, LAST, REPORT)
_TENSORBOARD = "tensorboard"
_BUFFER = 2**16  # bytes of lines held back at most

# Settings (dotted, or a whole section) that decide where and how a run computes, not what: it may be resumed
# with others, as on another number of ranks.
FREE_KEYS = ("threads", "tensorboard", "checkpoint", "memory_gib", "data.resident", "router_monitor")
_PATHS = ("data.path", "data.split_file", "start")
# Why the others that one would change are not among them.
_REASONS = {
    "optim.epochs": "the learning rate's schedule spans all epochs",
    "optim.batch_size": "it decides which crystals a step sees",
    "device": "devices round differently",
    "backend": "backends round differently",
    "precision": "it decides how products are rounded",
    "seed": "the order of the crystals and the noise follow from it",
    "start": "the weights that the run began with",
}


class NullLog:
    """A run log that keeps nothing and shows nothing, for the ranks of a run but the first.

    Args:
        folder: the run folder.
        console: on which nothing is printed.
    """

    def __init__(self, folder: str | Path, console: Console):
        self.folder, self.console = Path(folder), console

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        """Do nothing."""

    def record(self, epoch: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def record_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def position(self) -> dict[str, int]:
        """Return no position."""
        return {}

    def rewind(self, position: Mapping[str, int] | None) -> None:
        """Do nothing."""

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def progress(self) -> Progress:
        """Return a progress bar that is not shown."""
        return Progress(console=self.console, disable=True)


class RunLog(NullLog):
    """Writes a run's records; use it as a context manager.

    Every epoch is a line of metrics.jsonl, every step one of steps.jsonl. On a terminal a progress bar shows
    the steps; elsewhere only whole lines are printed. The folder is locked from the beginning to the end.

    Args:
        folder: the run folder.
        config: the resolved configuration.
        console: where progress goes.
        overwrite: remove the run that the folder may already hold.
        resume: continue the run that the folder holds; `rewind` must follow before anything is recorded.

    Raises:
        FolderLockedError: if another process writes the folder; nothing in it is touched.
        FileExistsError: if the folder holds anything that a run writes, and neither option is given.
        ConfigError: if the run to resume has other settings, but for `FREE_KEYS`; naming them.
    """

    def __init__(
        self,
        folder: str | Path,
        config: RunConfig,
        console: Console,
        overwrite: bool = False,
        resume: bool = False,
    ):
        super().__init__(folder, console)
        if overwrite and resume:
            raise ValueError("a run is either resumed or overwritten")
        with ExitStack() as stack:
            stack.enter_context(FolderLock(self.folder))
            for name in _FILES:
                remove_leftovers(self.folder / name)
            if resume:
                check_same_settings(self.folder, config)
            else:
                self._make_room(overwrite)
            replace_file(self.folder / CONFIG, dump_config(config).encode())
            self._lines = {name: _Lines(self.folder / name) for name in (METRICS, STEPS)}
            for lines in self._lines.values():
                stack.callback(lines.close)
            self._tensorboard = None
            self._wants_tensorboard = config.tensorboard
            if config.tensorboard and not resume:
                self._tensorboard = _summary_writer(self.folder / _TENSORBOARD)
            self._stack = stack.pop_all()

    def __exit__(self, *exception) -> None:
        with self._stack:
            if self._tensorboard is not None:
                self._tensorboard.close()

    def record(self, epoch: int, values: Mapping[str, float]) -> None:
        """Append one epoch's numbers to metrics.jsonl (and to TensorBoard)."""
        self._lines[METRICS].append({"epoch": epoch, **values})
        self._lines[METRICS].flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, epoch)

    def record_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Append one step's numbers to steps.jsonl, which is written in larger pieces."""
        self._lines[STEPS].append({"step": step, "epoch": epoch, **values})

    def position(self) -> dict[str, int]:
        """Bring all lines to the disk; return where each file ends, for the state that is saved next."""
        return {name: lines.sync() for name, lines in self._lines.items()}

    def rewind(self, position: Mapping[str, int] | None) -> None:
        """Cut the files back to where they ended when a state was saved; None empties them.

        Raises:
            CheckpointError: if a file is shorter than that; nothing is cut then.
        """
        ends = {name: 0 if position is None else position[name] for name in self._lines}
        for name, lines in self._lines.items():
            if lines.end < ends[name]:
                raise CheckpointError(
                    f"{lines.path} is damaged: it has {lines.end} bytes, {ends[name]} were written when the "
                    "state was saved; restore it from a copy, or start the run anew (--overwrite)"
                )
        for name, lines in self._lines.items():
            lines.truncate(ends[name])
        if self._wants_tensorboard:
            if self._tensorboard is not None:
                self._tensorboard.close()
            epochs = [record["epoch"] for record in read_metrics(self.folder)]
            # TensorBoard forgets the events of this epoch and later ones.
            purge_step = max(epochs, default=0) + 1
            self._tensorboard = _summary_writer(self.folder / _TENSORBOARD, purge_step)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write the run's final figures as results.json."""
        replace_file(self.folder / RESULTS, (json.dumps(results, indent=2) + "\n").encode())

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

    def _make_room(self, overwrite: bool) -> None:
        """Remove the run that the folder holds, if that is allowed."""
        held = [name for name in (*_FILES, CHECKPOINTS, _TENSORBOARD) if (self.folder / name).exists()]
        if held and not overwrite:
            raise FileExistsError(
                f"{self.folder} already holds {', '.join(held)}; choose another folder or pass --overwrite"
            )
        for name in _FILES:
            (self.folder / name).unlink(missing_ok=True)
        StateStore(self.folder).clear()
        if (self.folder / _TENSORBOARD).exists():
            shutil.rmtree(self.folder / _TENSORBOARD)


class _Lines:
    """A file of one JSON object a line, written from a buffer; floats come back exactly.

    Attributes:
        path: the file.
        end: bytes written to it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._buffer = bytearray()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.end = os.fstat(self._file).st_size

    def append(self, record: Mapping[str, Any]) -> None:
        self._buffer += json.dumps(record).encode() + b"\n"
        if len(self._buffer) >= _BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write the buffer; on a failure the file keeps whole lines alone, and the buffer its own."""
        with explained(str(self.path), self.path.parent, len(self._buffer), self._situation):
            os.lseek(self._file, self.end, os.SEEK_SET)  # over what a failed attempt left
            write_all(self._file, bytes(self._buffer))
        self.end += len(self._buffer)
        self._buffer.clear()

    def sync(self) -> int:
        """Bring everything to the disk; return the file's size."""
        self.flush()
        with explained(str(self.path), self.path.parent, 0, self._situation):
            os.fsync(self._file)
        return self.end

    def truncate(self, end: int) -> None:
        self._buffer.clear()
        os.ftruncate(self._file, end)
        self.end = end

    def close(self) -> None:
        try:
            if self._buffer:
                self.flush()
        finally:
            os.close(self._file)

    def _situation(self) -> str:
        return f"its first {self.end} bytes are whole"


def say(console: Console, text: str) -> None:
    """Print one line as it is, never wrapped or coloured by its contents."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Read the records of a run folder's metrics.jsonl, oldest first."""
    return list(_records(Path(folder) / METRICS))


def read_steps(folder: str | Path) -> list[dict[str, float]]:
    """Read the records of a run folder's steps.jsonl, oldest first."""
    return list(_records(Path(folder) / STEPS))


def _records(file: Path) -> Iterator[dict[str, float]]:
    """Read a file's lines, without the one that a killed process may have begun."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def check_same_settings(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError unless the folder holds a run with these settings."""
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"{folder} holds no run to resume: it has no {CONFIG}")
    stored, given = (decisive_settings(some) for some in (load_config(type(config), file), config))
    faults = []
    for key in sorted(stored.keys() | given.keys()):
        if not _same_setting(key, stored.get(key), given.get(key)):
            reason = f" ({_REASONS[key]})" if key in _REASONS else ""
            faults.append(f"{key} = {given.get(key)!r}, the run has {stored.get(key)!r}{reason}")
    if faults:
        raise ConfigError(
            f"{folder} cannot be resumed with other settings: {'; '.join(faults)}. Resume it with its own "
            f"(--config {file}), or start another run in another folder"
        )


def decisive_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide what a run computes, by dotted key: all but `FREE_KEYS`."""
    return {key: value for key, value in _flat(config.model_dump(mode="json")).items() if not is_free(key)}


def is_free(key: str) -> bool:
    """Return whether a dotted key, or the section that it is in, is one of `FREE_KEYS`."""
    return any(key == name or key.startswith(f"{name}.") for name in FREE_KEYS)


def _same_setting(key: str, one: Any, other: Any) -> bool:
    """Return whether two values of a key say the same; a path may be spelt in several ways."""
    if key in _PATHS and one is not None and other is not None:
        return os.path.realpath(one) == os.path.realpath(other)
    return one == other


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _summary_writer(folder: Path, purge_step: int | None = None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        remedy = "pip install 'mgt-fast[tensorboard]'"
        raise ImportError(f"tensorboard=true needs TensorBoard: {remedy}") from error
    return SummaryWriter(folder, purge_step=purge_step)
