"""Fine-tuning on one property, from pretrained weights or from scratch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console

from ..checkpoint import (
    BEST,
    LAST,
    CheckpointMeta,
    load_checkpoint,
    load_model,
    save_checkpoint,
    transfer_weights,
)
from ..data import CrystalDataset
from ..distributed import Ranks
from ..graph import CrystalGraph
from ..inference import PredictionTable, write_table
from ..losses import mean_over_crystals
from ..model import MGT
from ..profiling import span
from ..target_scaling import TargetScaling
from .batches import (
    PARTS,
    DataError,
    require_part,
    require_two,
    select_parts,
    target_values,
)
from .capture import CapturedStep
from .config import ConfigError, FinetuneConfig
from .evaluate import predict_part
from .feed import GraphSource
from .loop import Fit
from .plan import BatchPlan
from .run import open_run
from .runlog import PREDICTIONS, read_metrics
from .runstate import StateStore
from .setup import (
    autocast,
    check_fits_checkpoint,
    crystals_digest,
    describe_device,
    describe_parts,
    graph_source,
    manifest_digest,
    memory_budget,
    open_dataset,
    planned_edges,
    split_digest,
    start_torch,
)
from .stagnation import share_figures, stagnation
from .step import Batch, Chunk, ChunkLoss
from .targets import errors, trivial_errors
from .task import GraphTask

_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class FinetuneTask(GraphTask):
    """Regression of scaled targets; epochs are judged by the val MAE in the target's units.

    Args:
        model, source, plan, config, ranks: see `GraphTask`.
        targets: of every crystal of the dataset, (n,), in the target's units.
        parts: crystals of each part.
        scaling: of the targets.
    """

    monitor = "val_mae"

    def __init__(
        self,
        model: MGT,
        source: GraphSource,
        plan: BatchPlan,
        targets: np.ndarray,
        parts: dict[str, np.ndarray],
        scaling: TargetScaling,
        config: FinetuneConfig,
        ranks: Ranks | None = None,
    ):
        # Captured steps pad graphs on the CPU.
        of_batches = replace(source, device=torch.device("cpu"), resident=None) if config.capture else source
        super().__init__(model, of_batches, plan, config, ranks)
        self.source, self.targets, self.parts, self.scaling = source, targets, parts, scaling

    def forward(self, batch: Batch, chunk: Chunk) -> ChunkLoss:
        """Compute a chunk's share of the mean loss on scaled targets, and of the MAE in target units."""
        targets = self.batch_targets(chunk.crystals).to(self.source.device)
        loss, figures = self.loss_of(chunk.graph, targets, chunk.keys)
        share = len(chunk.crystals) / batch.size
        return ChunkLoss(loss * share, {name: value * share for name, value in figures.items()})

    def batch_targets(self, crystals: np.ndarray) -> torch.Tensor:
        """Return the scaled targets of some crystals, (b,) float32 on the CPU."""
        return torch.from_numpy(self.scaling.scale(self.targets[crystals])).float()

    def loss_of(
        self, graph: CrystalGraph, scaled: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the mean loss on scaled targets, and the MAE in target units; filler does not count."""
        with autocast(self.config, self.source.device):
            predicted = self.model(graph, keys=keys).prediction.squeeze(1)
        with span("loss"):
            predicted = predicted.float()
            # Of values that are only scaled the mean cancels, which keeps the digits of small errors.
            if self.scaling.transform == "none":
                error = (predicted.detach() - scaled) * self.scaling.std
            else:
                error = self.scaling.unscale(predicted.detach()) - self.scaling.unscale(scaled)
            mae = mean_over_crystals(error.abs(), graph)
            loss = _LOSSES[self.config.loss](predicted, scaled, reduction="none")
            return mean_over_crystals(loss, graph), {"mae": mae}

    def validate(self) -> dict[str, float]:
        """Return the MAE and RMSE of the val part, and how the router divides it between the views."""
        table = self.predict("val")
        found = errors(self.targets[self.parts["val"]], table.prediction)
        network = self.config.model
        routed = network.views == "both" and network.fusion == "router"
        shares = share_figures(table.contributions, self.config.router_monitor) if routed else {}
        return {"val_mae": found["mae"], "val_rmse": found["rmse"], **shares}

    def predict(self, part: str) -> PredictionTable:
        """Predict every crystal of a part, in its order; every rank gets the whole table."""
        batch_size = self.config.optim.batch_size
        return predict_part(self.model, self.source, self.parts[part], batch_size, self.ranks)


def finetune(
    config: FinetuneConfig,
    folder: str | Path,
    console: Console,
    start: str | Path | None = None,
    overwrite: bool = False,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Fine-tune a network and score it; the run folder keeps checkpoints, states, metrics and predictions.

    Args:
        config: the run.
        folder: the run folder.
        console: where progress goes.
        start: replaces `config.start`, the checkpoint to take pretrained weights from.
        overwrite: replace the run that the folder may hold.
        resume: continue the run that the folder holds, bit for bit; see `run.open_run`.
        resume_from: step of the state to continue from; None takes the latest.
        ranks: of the run; None for a single one.

    Returns:
        For "val" and "test" (where there is one): "model", "mean" and "median" errors, the latter two
        those of always predicting that of the training targets; see `targets.errors`.

    Raises:
        ConfigError, CheckpointError: if the checkpoint does not fit the configuration, or steps shall be
            captured where they cannot be; and as `run.open_run`, `loop.Fit.resume`.
        DataError: if the target is unknown, a part is empty or there is one crystal to learn from.
        MemoryBudgetError: if a crystal does not fit the memory.
        FileExistsError, FolderLockedError: see `run.open_run`.
        NonFiniteLossError, RunStoppedError, RankError: see `loop.Fit.run`.
    """
    ranks = ranks or Ranks()
    if start is not None:
        config = config.model_copy(update={"start": Path(start)})
    device = start_torch(config)
    task, known = finetuning_task(config, device, ranks, console)
    model, parts = task.model, task.parts
    continues = ranks.gather(resume and StateStore(folder).exists())[0]
    origin = "of the saved state" if continues else _transfer(model, config, ranks)
    step = _capturing(task, config) if config.capture else None
    with open_run(folder, config, console, ranks, overwrite, resume) as run:
        log = run.log
        sizes = {name: len(parts[name]) for name in PARTS if name in parts}
        log.say(
            f"fine-tuning {config.data.target} on {describe_device(device, ranks)}: "
            f"{describe_parts(sizes)} crystals"
        )
        log.say(f"weights {origin}")
        if not known.all():
            log.say(f"left out {int((~known).sum())} of {len(known)} crystals without {config.data.target}")

        def save(epoch: int, metrics: dict[str, float], improved: bool) -> None:
            meta = replace(model.meta, epoch=epoch, metrics=metrics)
            for name in (LAST, BEST) if improved else (LAST,):
                save_checkpoint(run.folder / name, model, meta)
            if warning := stagnation(read_metrics(run.folder), config.router_monitor):
                log.say(warning)

        fit = Fit(
            task,
            config.optim,
            log,
            save,
            config.early_stopping,
            step,
            ranks=ranks,
            store=run.store,
            checkpoint=config.checkpoint,
            dataset=crystals_digest(model.meta.dataset, model.meta.split),
            attached=[run.folder / BEST],
        )
        result = run.fit(fit, resume_from)
        with ranks.together():
            task.model = load_model(run.folder / BEST, config.backend, device)
        results, columns = _score(task)
        if ranks.is_main:
            write_table(run.folder / PREDICTIONS, columns)
        log.write_results(results | {"epochs": result.epochs, "best_epoch": result.best_epoch})
        for line in report_lines(results, model.meta.unit):
            log.say(line)
        log.say(
            f"best epoch {result.best_epoch} of {result.epochs}; checkpoints, predictions in {run.folder}"
        )
    return results


def finetuning_task(
    config: FinetuneConfig, device: torch.device, ranks: Ranks, console: Console | None = None
) -> tuple[FinetuneTask, np.ndarray]:
    """Return a fresh network with its crystals, and which of the dataset have the target, (n,) bool."""
    if config.model.output_dim != 1:
        raise DataError(f"model.output_dim = {config.model.output_dim}, but one target is fine-tuned: set 1")
    dataset = open_dataset(config.data.path, ranks)
    targets = target_values(dataset, config.data.target)
    known = _known(dataset, targets, config.data.target)
    parts = select_parts(dataset, config.data, config.seed, known)
    train = require_part(parts, "train", "learn from")
    require_part(parts, "val", "choose the best epoch on")
    require_two(dataset, train)
    scaling = _scaling(config, dataset, targets, known, train)
    model = MGT(config.model, backend=config.backend)
    model.meta = CheckpointMeta(
        model=config.model,
        max_neighbors=config.data.max_neighbors,
        compat=config.data.compat,
        shell_tolerance=config.data.shell_tolerance,
        target=config.data.target,
        unit=dataset.target_units[config.data.target] or None,
        target_mean=scaling.mean,
        target_std=scaling.std,
        target_transform=scaling.transform,
        dataset=manifest_digest(dataset),
        fractions=config.data.fractions,
        seed=None if config.data.fractions is None else config.seed,
        split=split_digest(config, ranks),
    )
    used = np.concatenate([parts[name] for name in PARTS if name in parts])
    edges = planned_edges(config, dataset, used, ranks, console)
    source = graph_source(config, dataset, device, used, ranks)
    plan = BatchPlan(
        train,
        edges[train],
        config.optim.batch_size,
        num_ranks=ranks.size,
        seed=config.seed,
        smallest=2,
        budget=memory_budget(config, device, ranks, source.resident_bytes),
        names=dataset.ids,
    )
    return FinetuneTask(model.to(device), source, plan, targets, parts, scaling, config, ranks), known


def _scaling(
    config: FinetuneConfig, dataset: CrystalDataset, targets: np.ndarray, known: np.ndarray, train: np.ndarray
) -> TargetScaling:
    transform = config.data.transform
    if transform == "log" and (bad := np.flatnonzero(known & ~(targets > 0))).size:
        listed = ", ".join(f"{dataset.ids[i]}: {targets[i]:g}" for i in bad[:10])
        raise DataError(
            f"data.transform = log needs positive targets, but {config.data.target} is not for {bad.size} "
            f"crystals ({listed}); remove them, or set data.transform=none"
        )
    if not config.data.scale_target:
        return TargetScaling(transform=transform)
    return TargetScaling.fit(targets[train], transform)


def _transfer(model: MGT, config: FinetuneConfig, ranks: Ranks) -> str:
    """Take over pretrained weights, if the run starts from any; say where the weights are from."""
    if config.start is None:
        return "from scratch"
    with ranks.together():
        state, meta = load_checkpoint(config.start)
        check_fits_checkpoint(config, meta)
        fresh, unused = transfer_weights(model, state)
    return (
        f"from {config.start} (newly initialised: {', '.join(fresh) or 'nothing'}; "
        f"not used: {', '.join(unused) or 'nothing'})"
    )


def _capturing(task: FinetuneTask, config: FinetuneConfig) -> CapturedStep:
    if task.ranks.size > 1:
        raise ConfigError(
            f"capture = true: only a single rank captures steps, and there are {task.ranks.size}"
        )
    try:
        return CapturedStep(task, config.optim.weight_decay, config.optim.grad_clip)
    except ValueError as error:
        raise ConfigError(f"capture = true: {error}") from error


def _known(dataset: CrystalDataset, targets: np.ndarray, name: str) -> np.ndarray:
    """Return which crystals have a target, (n,) bool; infinite targets are an error."""
    infinite = np.flatnonzero(np.isinf(targets))
    if infinite.size:
        ids = ", ".join(dataset.ids[i] for i in infinite[:10])
        raise DataError(f"{name} is infinite for {infinite.size} crystals ({ids}); remove them")
    return ~np.isnan(targets)


def _score(task: FinetuneTask) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Score val and test; return the errors and the columns of the predictions' table."""
    results, columns = {}, []
    for part in ("val", "test"):
        if not len(task.parts.get(part, ())):
            continue
        target, table = task.targets[task.parts[part]], task.predict(part)
        results[part] = {
            "model": errors(target, table.prediction),
            **trivial_errors(target, task.targets[task.parts["train"]]),
        }
        columns.append(table.columns(target, part))
    return results, {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}


def report_lines(results: dict[str, Any], unit: str | None) -> list[str]:
    """Return a small table of errors beside the trivial predictors', as lines of text."""
    unit = f" {unit}" if unit else ""
    return [
        f"{part:>4}: MAE {found['model']['mae']:.4g}{unit}, RMSE {found['model']['rmse']:.4g}{unit} "
        f"over {found['model']['count']} crystals; trivial MAE {found['mean']['mae']:.4g} (mean), "
        f"{found['median']['mae']:.4g} (median)"
        for part, found in results.items()
    ]
