"""The command line: `mgt-fast prepare, pretrain, finetune, profile, evaluate, predict, ...`.

Commands import what they need when they run; errors of the user's become one line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .train.config import RunConfig

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
def _reported_errors() -> Iterator[None]:
    """Print what is wrong with the user's input in one line instead of a traceback, and exit with 1."""
    from .distributed import RankError
    from .train.interrupt import RunStoppedError
    from .train.loop import NonFiniteLossError

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


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """Turn ["a=b", ...] into {"a": "b", ...}."""
    pairs = [text.partition("=") for text in texts or ()]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise ValueError(f"{option} {key}{equals}{value}: expected NAME=VALUE")
    return {key: value for key, _, value in pairs}


def _new_folder(command: str) -> Path:
    return Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"


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
    from .train.runlog import CONFIG
    from .train.runstate import step_of

    resume = resume or resume_from is not None
    if folder is None:
        if resume:
            raise ValueError("--resume: name the run folder to continue (--output)")
        folder = _new_folder(command)
    own = folder / CONFIG
    path = str(own) if resume and config is None and own.is_file() else config
    return _RunOptions(folder, path, resume, None if resume_from is None else step_of(resume_from))


@app.command()
def prepare(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files, folders and archives; formats are recognised.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Dataset folder to make.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", help="Column to store, or COLUMN=NAME; repeatable. All numbers when absent."
        ),
    ] = None,
    unit: Annotated[
        list[str] | None,
        typer.Option("--unit", "-u", metavar="NAME=UNIT", help="Unit of a target; repeatable."),
    ] = None,
    require_target: Annotated[
        str, typer.Option(help="Reject a record that lacks any (has none), all (lacks one) or none.")
    ] = "any",
    labels: Annotated[
        Path | None, typer.Option(help="id_prop.csv with the targets of CIF or POSCAR files.")
    ] = None,
    split_file: Annotated[
        Path | None,
        typer.Option(help="Parts (JSON {train: ids, ...} or csv with id, split); a split column serves too."),
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Format of all files, not recognised.")
    ] = None,
    workers: WorkersOption = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="Crystals a shard.")] = None,
    max_neighbors: Annotated[
        int, typer.Option(min=0, help="Count edges for runs with so many neighbours; 0: do not count.")
    ] = 25,
    overwrite: OverwriteOption = False,
) -> None:
    """Read crystals in many formats into one dataset; every record is stored or listed in rejects.csv."""
    with _reported_errors():
        from .data import prepare as run
        from .data.store import DEFAULT_SHARD_SIZE

        targets = [text.partition("=") for text in target or ()]
        summary = run(
            inputs,
            output,
            targets={key: name or key for key, _, name in targets} or None,
            units=_pairs(unit, "--unit"),
            require_target=require_target,
            labels=labels,
            split_file=split_file,
            format=format_,
            workers=workers,
            shard_size=shard_size or DEFAULT_SHARD_SIZE,
            max_neighbors=max_neighbors or None,
            overwrite=overwrite,
            console=err,
        )
        typer.echo(str(summary))
        if not summary.stored:
            raise ValueError(f"no crystal was stored; {output / 'rejects.csv'} says why")


def _on_ranks(run: Callable, settings: RunConfig, options: _RunOptions, **more) -> None:
    """Call `run` on every rank; the first one's name of the folder counts, which may hold the time."""
    from .distributed import joined_ranks
    from .train.setup import resolve_device

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
    with _reported_errors():
        from .train import config as configs
        from .train.pretrain import pretrain as run

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
    with _reported_errors():
        from .checkpoint import load_checkpoint
        from .train import config as configs
        from .train.finetune import finetune as run
        from .train.setup import values_from_checkpoint

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
    with _reported_errors():
        from .train import config as configs
        from .train import profile as profiles
        from .train.profile_report import report, tool_lines

        kind = configs.PretrainConfig if run == "pretrain" else configs.FinetuneConfig
        settings = configs.load_config(kind, config, set_ or ())
        if under is not None:
            profiles.run_steps(settings, steps, warmup)
            return
        folder = profiles.open_folder(output or _new_folder("profile"), overwrite)
        found = profiles.profile_steps(settings, folder, steps, warmup)
        typer.echo(report(found))
        typer.echo(
            f"\ntrace for ui.perfetto.dev: {folder / profiles.TRACE}; tables: {folder / profiles.PROFILE}"
        )
        command = ["mgt-fast", "profile", run, *(["--config", config] if config else [])]
        command += [part for setting in set_ or () for part in ("--set", setting)]
        for line in tool_lines([*command, f"--steps={steps}", f"--warmup={warmup}"], folder, found):
            typer.echo(line)


@app.command()
def evaluate(
    model: ModelOption,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", "-d", help="Prepared dataset; the bundled one when absent.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, val, test or all.")] = "test",
    target: Annotated[
        str | None,
        typer.Option("--target", help="The dataset's column; the checkpoint's target when absent."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write predictions, .csv or .parquet.")
    ] = None,
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Report MAE and RMSE of a checkpoint over every crystal of a part that has the target."""
    with _reported_errors():
        from .checkpoint import load_model
        from .distributed import joined_ranks
        from .inference import check_new_table, write_table
        from .train.evaluate import evaluate as run
        from .train.setup import open_dataset, resolve_device

        with joined_ranks(resolve_device(device)) as ranks:
            with ranks.together():
                if output is not None:
                    check_new_table(output, overwrite)
                network = load_model(model, device=resolve_device(device))
            result = run(network, open_dataset(dataset, ranks), split, target, batch_size, ranks)
        if not ranks.is_main:
            return
        unit = f" {result.table.unit}" if result.table.unit else ""
        found = result.errors
        typer.echo(
            f"{result.table.target}, {split}: MAE {found['mae']:.6g}{unit}, RMSE {found['rmse']:.6g}{unit} "
            f"over {found['count']} crystals"
        )
        if result.missing:
            typer.echo(f"left out {result.missing} crystals without the target")
        if output is not None:
            write_table(output, result.table.columns(result.target))


@app.command()
def predict(
    paths: Annotated[list[Path], typer.Argument(help="CIF files, folders, archives, or prepared datasets.")],
    model: ModelOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Table to write, .csv or .parquet.")],
    overwrite: OverwriteOption = False,
    batch_size: BatchOption = 64,
    workers: WorkersOption = None,
    device: DeviceOption = "auto",
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory a batch may take; a share of the device's when absent.", min=0),
    ] = None,
) -> None:
    """Predict crystals: id, prediction, and the router's contribution of each view.

    Crystals of the same name have their file's path (and row) as id.

    What cannot be read or predicted is listed in <output name>.rejects.csv beside the table and counted on
    stderr. The exit status is 1 only if nothing could be predicted at all.
    """
    with _reported_errors():
        from dataclasses import asdict

        from .checkpoint import load_model
        from .distributed import joined_ranks
        from .inference import check_new_table, predict_paths, write_table
        from .train.setup import resolve_device

        rejects_path = output.with_suffix(".rejects.csv")
        with joined_ranks(resolve_device(device)) as ranks:
            with ranks.together():
                for path in (output, rejects_path):
                    check_new_table(path, overwrite)
                network = load_model(model, device=resolve_device(device))
            console = err if ranks.is_main else None
            memory = None if memory_gib is None else memory_gib * 2**30
            table, rejects = predict_paths(network, paths, batch_size, workers, console, ranks, memory)
        if not ranks.is_main:
            return
        for path in (output, rejects_path):
            path.unlink(missing_ok=True)
        count = 0 if table is None else len(table)
        if rejects:
            rows = [asdict(reject) for reject in rejects]
            write_table(rejects_path, {name: [row[name] for row in rows] for name in rows[0]})
            typer.echo(
                f"{len(rejects)} of {len(rejects) + count} crystals not predicted; see {rejects_path}",
                err=True,
            )
        if table is None:
            raise ValueError("nothing was predicted")
        table.write(output)
        typer.echo(f"{output}: {table.label} of {count} crystals")


@app.command("import-checkpoint")
def import_checkpoint(
    published: Annotated[Path, typer.Argument(help="The published program's .pt file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint to write, .safetensors.")],
    target: Annotated[str | None, typer.Option(help="What the network predicts.")] = None,
    unit: Annotated[str | None, typer.Option(help="Unit of the target.")] = None,
    mean: Annotated[float, typer.Option(help="Mean of the training targets, if they were scaled.")] = 0.0,
    std: Annotated[float, typer.Option(help="Their standard deviation.")] = 1.0,
    max_neighbors: Annotated[int, typer.Option(min=1, help="Neighbours it was trained with.")] = 25,
    compat: Annotated[
        str, typer.Option(help="Graphs it is given: comformer (as it was trained) or none (whole shells).")
    ] = "comformer",
    overwrite: OverwriteOption = False,
) -> None:
    """Convert a published .pt checkpoint; sizes are read from its tensors, no code in it is run."""
    with _reported_errors():
        from .checkpoint import CheckpointMeta, save_checkpoint
        from .importer import config_from_state_dict, load_published_checkpoint, published_state_dict
        from .model import MGT

        if output.suffix != ".safetensors":
            raise ValueError(f"{output}: a checkpoint's name ends in .safetensors")
        if output.exists() and not overwrite:
            raise FileExistsError(f"{output} exists; choose another name or pass --overwrite")
        if compat not in ("comformer", "none"):
            raise ValueError(f"--compat {compat}: choose comformer or none")
        if not std > 0:
            raise ValueError(f"--std {std}: a standard deviation is greater than 0")
        state, ignored = published_state_dict(load_published_checkpoint(published))
        network = MGT(config_from_state_dict(state))
        network.load_state_dict(state)
        save_checkpoint(
            output,
            network,
            CheckpointMeta(
                model=network.config,
                max_neighbors=max_neighbors,
                compat=None if compat == "none" else compat,
                target=target,
                unit=unit,
                target_mean=mean,
                target_std=std,
            ),
        )
        typer.echo(f"{output}: {network.config}")
        if ignored:
            typer.echo(f"ignored {len(ignored)} parameters that the network never uses: {', '.join(ignored)}")


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
    with _reported_errors():
        from .demo import run_demo

        run_demo(output, out, set_ or ())
