"""Opening a run: its folder, its log and its saved states, on one rank for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..distributed import Ranks
from .config import RunConfig
from .environment import record_environment
from .loop import Fit, FitResult
from .runlog import CONFIG, NullLog, RunLog, decisive_settings
from .runstate import StateStore


@dataclass(frozen=True)
class Run:
    """A run folder that is open.

    Attributes:
        folder: the folder.
        log: writes on the first rank, and is silent on others.
        store: the states.
        resumed: whether there is a state to continue from.
    """

    folder: Path
    log: NullLog
    store: StateStore
    resumed: bool

    def fit(self, fit: Fit, resume_from: int | None = None) -> FitResult:
        """Train from the beginning, or from the latest state or that of a step."""
        if self.resumed:
            fit.resume(resume_from)
            course = fit.course
            self.log.say(f"continuing after step {course.step}, in epoch {course.epoch}")
        return fit.run()


@contextmanager
def open_run(
    folder: str | Path,
    config: RunConfig,
    console: Console,
    ranks: Ranks,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Run]:
    """Open a run folder.

    Args:
        folder: the run folder; ranks on several machines must share it.
        config: of the run.
        console: where the first rank reports.
        ranks: of the run.
        overwrite: replace the run that the folder may hold.
        resume: continue the run that the folder holds; a folder that holds none yet gets a new one.

    Raises:
        FileExistsError, FolderLockedError, ConfigError: as `RunLog`.
        RankError: on ranks other than the first, if it could not open the folder; if ranks have different
            configurations.
    """
    folder = Path(folder)
    ranks.require_equal(decisive_settings(config), "configuration")
    store = StateStore(folder, config.checkpoint.keep)
    log: NullLog = NullLog(folder, console)
    held = resume and (folder / CONFIG).is_file()
    held = ranks.gather(held)[0]  # the first rank decides: it is the one that writes
    with ranks.together():
        if ranks.is_main:
            log = RunLog(folder, config, console, overwrite, resume=held)
    with log:
        with ranks.together():
            if ranks.is_main:
                record_environment(folder, config, ranks)
        resumed = ranks.gather(held and store.exists())[0]
        if held and not resumed:
            log.rewind(None)
        if resume and not resumed:
            log.say("there is no saved state to continue from: starting from the beginning")
        yield Run(folder, log, store, resumed)
