"""The command line: `mgt-fast prepare, pretrain, finetune, predict, evaluate, import-checkpoint, demo`.

Commands import what they need when they run, so that `mgt-fast --help` answers at once.
"""

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


@app.callback()
def main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Set options of every command."""
    global _debug
    _debug = debug


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Print what is wrong with the user's input in one line instead of a traceback, and exit with 1."""
    from .train.loop import NonFiniteLossError

    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError, NonFiniteLossError) as error:
        if _debug:
            raise
        err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True, style="red")
        raise typer.Exit(1) from None


def _run_folder(folder: Path | None, command: str) -> Path:
    return folder or Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"


@app.command()
def pretrain(
    config: ConfigOption = None,
    set_: SetOption = None,
    output: FolderOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Pretrain on crystals without labels: contrast between the views, and denoising."""
    with _reported_errors():
        from .train import config as configs
        from .train.pretrain import pretrain as run

        settings = configs.load_config(configs.PretrainConfig, config, set_ or ())
        run(settings, _run_folder(output, "pretrain"), out, overwrite)


@app.command()
def finetune(
    config: ConfigOption = None,
    set_: SetOption = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Pretrained checkpoint or run folder; scratch when absent.")
    ] = None,
    output: FolderOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Learn a property, from a pretrained checkpoint or from scratch, and score it on val and test."""
    with _reported_errors():
        from .checkpoint import load_checkpoint
        from .train import config as configs
        from .train.finetune import finetune as run
        from .train.setup import values_from_checkpoint

        base = None if start is None else values_from_checkpoint(load_checkpoint(start)[1])
        settings = configs.load_config(configs.FinetuneConfig, config, set_ or (), base)
        run(settings, _run_folder(output, "finetune"), out, start, overwrite)


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
    batch_size: BatchOption = 64,
    device: DeviceOption = "auto",
) -> None:
    """Report MAE and RMSE of a checkpoint over every crystal of a part that has the target."""
    with _reported_errors():
        from .checkpoint import load_model
        from .data import CrystalDataset
        from .inference import check_table_path, write_table
        from .train.evaluate import evaluate as run
        from .train.setup import resolve_device

        if output is not None:
            check_table_path(output)
        result = run(
            load_model(model, device=resolve_device(device)),
            CrystalDataset.open(dataset),
            split,
            target,
            batch_size,
        )
        unit = f" {result.table.unit}" if result.table.unit else ""
        found = result.errors
        typer.echo(
            f"{result.table.target}, {split}: MAE {found['mae']:.6g}{unit}, RMSE {found['rmse']:.6g}{unit} "
            f"over {found['count']} crystals"
        )
        if result.missing:
            typer.echo(f"left out {result.missing} crystals without the target")
        if output is not None:
            write_table(output, result.table.columns() | {"target": result.target})


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
