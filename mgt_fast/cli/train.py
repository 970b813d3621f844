"""Training, and profiling it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .common import (
    ConfigOption,
    FolderOption,
    OverwriteOption,
    ResumeFromOption,
    ResumeOption,
    SetOption,
    app,
    new_folder,
    out,
    reported_errors,
)

if TYPE_CHECKING:
    from ..train.config import RunConfig


@dataclass(frozen=True)
class _RunOptions:
    """Where a run is written, and whether it continues."""

    folder: Path
    path: str | None
    resume: bool
    resume_from: int | None


def _run_options(
    command: str, config: str | None, folder: Path | None, resume: bool, resume_from: str | None
) -> _RunOptions:
    """Say which configuration file a run reads: the run folder's own if it continues and names no other."""
    from ..train.runlog import CONFIG
    from ..train.runstate import step_of

    resume = resume or resume_from is not None
    if folder is None:
        if resume:
            raise ValueError("--resume: name the run folder to continue (--output)")
        folder = new_folder(command)
    own = folder / CONFIG
    path = str(own) if resume and config is None and own.is_file() else config
    return _RunOptions(folder, path, resume, None if resume_from is None else step_of(resume_from))


def _on_ranks(run: Callable, settings: RunConfig, options: _RunOptions, **more) -> None:
    """Call `run` on every rank; the first one's name of the folder counts, which may hold the time."""
    from ..distributed import joined_ranks
    from ..train.setup import resolve_device

    with joined_ranks(resolve_device(settings.device)) as ranks:
        folder = ranks.gather(options.folder)[0]
        run(
            settings, folder, out, resume=options.resume, resume_from=options.resume_from, ranks=ranks, **more
        )


@app.command()
def pretrain(
    config: ConfigOption = None,
    set_: SetOption = None,
    output: FolderOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    resume_from: ResumeFromOption = None,
) -> None:
    """Pretrain on crystals without labels: contrast between the views, and denoising."""
    with reported_errors():
        from ..train import config as configs
        from ..train.pretrain import pretrain as run

        options = _run_options("pretrain", config, output, resume, resume_from)
        settings = configs.load_config(configs.PretrainConfig, options.path, set_ or ())
        _on_ranks(run, settings, options, overwrite=overwrite)


@app.command()
def finetune(
    config: ConfigOption = None,
    set_: SetOption = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Pretrained checkpoint or run folder; scratch when absent.")
    ] = None,
    output: FolderOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    resume_from: ResumeFromOption = None,
) -> None:
    """Learn a property, from a pretrained checkpoint or from scratch, and score it on val and test."""
    with reported_errors():
        from ..checkpoint import load_checkpoint
        from ..train import config as configs
        from ..train.finetune import finetune as run
        from ..train.setup import values_from_checkpoint

        options = _run_options("finetune", config, output, resume, resume_from)
        base = None if start is None else values_from_checkpoint(load_checkpoint(start)[1])
        settings = configs.load_config(configs.FinetuneConfig, options.path, set_ or (), base)
        _on_ranks(run, settings, options, start=start, overwrite=overwrite)


@app.command()
def profile(
    run: Annotated[Literal["pretrain", "finetune"], typer.Argument(help="What to profile.")] = "pretrain",
    config: ConfigOption = None,
    set_: SetOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steady steps to look at.")] = 10,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them.")] = 3,
    output: FolderOption = None,
    overwrite: OverwriteOption = False,
    under: Annotated[
        Literal["nsys", "ncu"] | None,
        typer.Option(
            help="For the command lines that profile prints: mark the steps for this tool, no more."
        ),
    ] = None,
) -> None:
    """Show where the time of a training step goes: the share of each range, the roof of each operation.

    Leaves trace.json, which ui.perfetto.dev shows, and profile.json in the output folder.
    """
    with reported_errors():
        from ..train import config as configs
        from ..train import profile as profiles
        from ..train.profile_report import report, tool_lines

        kind = configs.PretrainConfig if run == "pretrain" else configs.FinetuneConfig
        settings = configs.load_config(kind, config, set_ or ())
        if under is not None:
            profiles.run_steps(settings, steps, warmup)
            return
        folder = profiles.open_folder(output or new_folder("profile"), overwrite)
        found = profiles.profile_steps(settings, folder, steps, warmup)
        typer.echo(report(found))
        typer.echo(
            f"\ntrace for ui.perfetto.dev: {folder / profiles.TRACE}; tables: {folder / profiles.PROFILE}"
        )
        command = ["mgt-fast", "profile", run, *(["--config", config] if config else [])]
        command += [part for setting in set_ or () for part in ("--set", setting)]
        for line in tool_lines([*command, f"--steps={steps}", f"--warmup={warmup}"], folder, found):
            typer.echo(line)
