"""Studies that compare runs: ablate, transfer, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import ConfigOption, SetOption, app, new_folder, out, reported_errors

SeedsOption = Annotated[str, typer.Option("--seeds", help="Seeds of every arm, separated by commas.")]
PretrainingConfigOption = Annotated[
    str | None,
    typer.Option(
        "--pretraining-config",
        help="Configuration of pretraining runs; when absent, the partner of --config (demo_pretrain of "
        "demo_finetune), or the published settings.",
    ),
]
PretrainingSetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--pretraining-set", metavar="A.B=C", help="Override one key of pretraining runs; repeatable."
    ),
]
StudyFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Study folder; runs/<command>-<time> when absent. The same command with the same folder goes on "
        "where it was.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show what every run says.")]


@app.command()
def ablate(
    config: ConfigOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = "0,1,2",
    pretraining: Annotated[
        str,
        typer.Option(
            help="Starts to compare, separated by commas: none, own, and checkpoints or run folders."
        ),
    ] = "none,own",
    variants: Annotated[
        str, typer.Option(help="Variants to compare with the last of them.")
    ] = "se3,so3,concat,router",
    pretraining_config: PretrainingConfigOption = None,
    pretraining_set: PretrainingSetOption = None,
    output: StudyFolderOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Compare each view alone, both concatenated, and the router; with and without pretraining."""
    with reported_errors():
        from ..studies.ablate import OWN, SCRATCH, ablate
        from ..studies.recipe import load_recipe

        starts = _names(pretraining)
        given = [Path(start) for start in starts if start not in (SCRATCH, OWN)]
        recipe = load_recipe(
            config,
            set_ or (),
            pretraining_config,
            pretraining_set or (),
            start=given[0] if given else None,
        )
        ablate(
            recipe,
            output or new_folder("ablate"),
            out,
            seeds=_seeds(seeds),
            pretraining=starts,
            variants=_names(variants),
            verbose=verbose,
        )


@app.command()
def transfer(
    source: Annotated[
        Path | None,
        typer.Option(help="Prepared dataset to pretrain on; that of --pretraining-config when absent."),
    ] = None,
    onto: Annotated[
        Path | None, typer.Option(help="Prepared dataset to fine-tune on; that of --config when absent.")
    ] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Checkpoint or run folder to take instead of pretraining.")
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="Numbers of training crystals, separated by commas; all takes all.")
    ] = "50,100,200,400,all",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of every run; when absent, all have the same epochs.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = "0,1,2",
    pretraining_config: PretrainingConfigOption = None,
    pretraining_set: PretrainingSetOption = None,
    output: StudyFolderOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Pretrain on one dataset and fine-tune on another, against training from scratch."""
    with reported_errors():
        from ..studies.recipe import load_recipe
        from ..studies.transfer import transfer

        if source is not None and start is not None:
            raise ValueError("--source and --from exclude each other: the checkpoint has its own source")
        recipe = load_recipe(
            config,
            [*(set_ or ()), *([f"data.path={onto}"] if onto else [])],
            pretraining_config,
            [*(pretraining_set or ()), *([f"data.path={source}"] if source else [])],
            start=start,
            same_crystals=False,
        )
        transfer(
            recipe,
            output or new_folder("transfer"),
            out,
            sizes=_names(sizes),
            seeds=_seeds(seeds),
            start=start,
            steps=steps,
            verbose=verbose,
        )


@app.command()
def sweep(
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            metavar="A.B=C,D,...",
            help="Key of the configuration and its values, the first of which is the baseline; pretraining.X "
            "is a key of the pretraining's losses, pretraining.A.B one of its configuration. Twice: a grid.",
        ),
    ],
    config: ConfigOption = None,
    set_: SetOption = None,
    seeds: SeedsOption = "0,1,2",
    pretraining: Annotated[
        bool,
        typer.Option(
            "--pretraining/--scratch",
            help="Pretrain first, once for each of the settings that it depends on, and each seed.",
        ),
    ] = False,
    pretraining_config: PretrainingConfigOption = None,
    pretraining_set: PretrainingSetOption = None,
    output: StudyFolderOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show what settings do to the error and to the throughput: neighbours, noise, shells, any key."""
    with reported_errors():
        from ..studies.recipe import load_recipe
        from ..studies.sweep import parse_axis, sweep

        axes = [parse_axis(text) for text in over]
        recipe = load_recipe(config, set_ or (), pretraining_config, pretraining_set or ())
        folder = output or new_folder("sweep")
        sweep(recipe, folder, out, axes, seeds=_seeds(seeds), pretraining=pretraining, verbose=verbose)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _seeds(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ValueError(f"--seeds {text}: expected whole numbers, as 0,1,2") from None
