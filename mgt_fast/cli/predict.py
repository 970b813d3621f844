"""Using checkpoints: scoring, predicting, importing published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BatchOption,
    DeviceOption,
    ModelOption,
    OverwriteOption,
    SplitFileOption,
    WorkersOption,
    app,
    err,
    reported_errors,
)


@app.command()
def evaluate(
    model: ModelOption,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", "-d", help="Prepared dataset; the bundled one when absent.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="train, val, test or all.")] = "test",
    split_file: SplitFileOption = None,
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
    with reported_errors():
        from ..checkpoint import load_model
        from ..distributed import joined_ranks
        from ..inference import check_new_table, write_table
        from ..train.evaluate import evaluate as run
        from ..train.setup import open_dataset, resolve_device

        with joined_ranks(resolve_device(device)) as ranks:
            with ranks.together():
                if output is not None:
                    check_new_table(output, overwrite)
                network = load_model(model, device=resolve_device(device))
            crystals = open_dataset(dataset, ranks)
            result = run(network, crystals, split, target, batch_size, ranks, split_file)
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
        if result.caution:
            typer.echo(f"warning: {result.caution}", err=True)
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
    with reported_errors():
        from dataclasses import asdict

        from ..checkpoint import load_model
        from ..distributed import joined_ranks
        from ..inference import check_new_table, predict_paths, write_table
        from ..train.setup import resolve_device

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
    with reported_errors():
        from ..checkpoint import CheckpointMeta, save_checkpoint
        from ..importer import config_from_state_dict, load_published_checkpoint, published_state_dict
        from ..model import MGT

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
