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
from ..graph import CrystalGraph
from ..inference import PredictionTable, predict_graphs, write_table
from ..losses import mean_over_crystals
from ..model import MGT
from .batches import (
    PARTS,
    DataError,
    GraphSource,
    require_part,
    require_two,
    select_parts,
    shuffled_batches,
    split_evenly,
    target_values,
)
from .capture import CapturedStep
from .config import ConfigError, FinetuneConfig
from .loop import fit
from .runlog import PREDICTIONS, RunLog
from .setup import autocast, check_fits_checkpoint, describe_parts, manifest_digest, start_torch
from .targets import TargetScaling, errors, trivial_errors

_LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class FinetuneTask:
    """Regression of scaled targets; epochs are judged by the val MAE in the target's units."""

    monitor = "val_mae"

    def __init__(
        self,
        model: MGT,
        source: GraphSource,
        targets: np.ndarray,
        parts: dict[str, np.ndarray],
        scaling: TargetScaling,
        config: FinetuneConfig,
    ):
        self.model, self.source, self.targets, self.parts = model, source, targets, parts
        self.scaling, self.config = scaling, config
        sizes = split_evenly(len(parts["train"]), config.optim.batch_size, smallest=2)
        self.steps_per_epoch, self.largest_batch = len(sizes), max(sizes)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the training crystals in shuffled batches."""
        return shuffled_batches(self.parts["train"], self.config.optim.batch_size, self.config.seed, epoch)

    def graph(self, indices: np.ndarray) -> CrystalGraph:
        """Build the graphs of a batch; on the CPU if they are padded there."""
        source = replace(self.source, device=torch.device("cpu")) if self.config.capture else self.source
        return source.graph(indices)

    def loss(self, indices: np.ndarray, graph: CrystalGraph) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss on scaled targets, and the MAE in the target's units."""
        return self.loss_of(graph, self.batch_targets(indices).to(self.source.device))

    def batch_targets(self, indices: np.ndarray) -> torch.Tensor:
        """Return the scaled targets of a batch, (B,) float32 on the CPU."""
        return torch.from_numpy(self.scaling.scale(self.targets[indices])).float()

    def loss_of(
        self, graph: CrystalGraph, scaled: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss on scaled targets, and the MAE in the target's units; filler does not count."""
        with autocast(self.config, self.source.device):
            predicted = self.model(graph).prediction.squeeze(1)
        predicted = predicted.float()
        mae = mean_over_crystals((predicted.detach() - scaled).abs(), graph) * self.scaling.std
        loss = _LOSSES[self.config.loss](predicted, scaled, reduction="none")
        return mean_over_crystals(loss, graph), {"mae": mae}

    def validate(self) -> dict[str, float]:
        """Return the MAE and RMSE of the val part."""
        found = errors(self.targets[self.parts["val"]], self.predict("val").prediction)
        return {"val_mae": found["mae"], "val_rmse": found["rmse"]}

    def predict(self, part: str) -> PredictionTable:
        """Predict every crystal of a part, in its order."""
        return predict_graphs(
            self.model, self.source.in_order(self.parts[part], self.config.optim.batch_size)
        )


def finetune(
    config: FinetuneConfig,
    folder: str | Path,
    console: Console,
    start: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fine-tune a network and score it; the run folder keeps checkpoints, metrics and predictions.

    Args:
        config: the run.
        folder: the run folder.
        console: where progress goes.
        start: checkpoint to take pretrained weights from; None starts from scratch.
        overwrite: replace the run that the folder may hold.

    Returns:
        For "val" and "test" (where there is one): "model", "mean" and "median" errors, the latter two
        those of always predicting that of the training targets; see `targets.errors`.

    Raises:
        ConfigError, CheckpointError: if the checkpoint does not fit the configuration, or steps shall be
            captured where they cannot be.
        DataError: if the target is unknown, a part is empty or there is one crystal to learn from.
        NonFiniteLossError: see `loop.fit`.
    """
    device = start_torch(config)
    dataset = CrystalDataset.open(config.data.path)
    targets = target_values(dataset, config.data.target)
    known = _known(dataset, targets, config.data.target)
    parts = select_parts(dataset, config.data, config.seed, known)
    train = require_part(parts, "train", "learn from")
    require_part(parts, "val", "choose the best epoch on")
    require_two(dataset, train)
    train_targets = targets[train]
    scaling = TargetScaling.fit(train_targets) if config.data.scale_target else TargetScaling()
    source = GraphSource(dataset, config.data.max_neighbors, config.data.compat, device)

    model = MGT(config.model, backend=config.backend)
    if config.model.output_dim != 1:
        raise DataError(f"model.output_dim = {config.model.output_dim}, but one target is fine-tuned: set 1")
    origin = "from scratch"
    if start is not None:
        state, start_meta = load_checkpoint(start)
        check_fits_checkpoint(config, start_meta)
        fresh, unused = transfer_weights(model, state)
        origin = (
            f"from {start} (newly initialised: {', '.join(fresh) or 'nothing'}; "
            f"not used: {', '.join(unused) or 'nothing'})"
        )
    model.meta = CheckpointMeta(
        model=config.model,
        max_neighbors=config.data.max_neighbors,
        compat=config.data.compat,
        target=config.data.target,
        unit=dataset.target_units[config.data.target] or None,
        target_mean=scaling.mean,
        target_std=scaling.std,
        dataset=manifest_digest(dataset),
        fractions=config.data.fractions,
        seed=None if config.data.fractions is None else config.seed,
    )
    model.to(device)
    task = FinetuneTask(model, source, targets, parts, scaling, config)
    step = _capturing(task, config) if config.capture else None
    with RunLog(folder, config, console, overwrite) as log:
        sizes = {name: len(parts[name]) for name in PARTS if name in parts}
        log.say(f"fine-tuning {config.data.target} on {device}: {describe_parts(sizes)} crystals")
        log.say(f"weights {origin}")
        if not known.all():
            log.say(f"left out {int((~known).sum())} of {len(known)} crystals without {config.data.target}")

        def save(epoch: int, metrics: dict[str, float], improved: bool) -> None:
            meta = replace(model.meta, epoch=epoch, metrics=metrics)
            for name in (LAST, BEST) if improved else (LAST,):
                save_checkpoint(log.folder / name, model, meta)

        result = fit(task, config.optim, log, save, config.early_stopping, step)
        task.model = load_model(log.folder / BEST, config.backend, device)
        results = _score(task, train_targets, log.folder)
        log.write_results(results | {"epochs": result.epochs, "best_epoch": result.best_epoch})
        for line in report_lines(results, model.meta.unit):
            log.say(line)
        log.say(
            f"best epoch {result.best_epoch} of {result.epochs}; checkpoints, predictions in {log.folder}"
        )
    return results


def _capturing(task: FinetuneTask, config: FinetuneConfig) -> CapturedStep:
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


def _score(task: FinetuneTask, train_targets: np.ndarray, folder: Path) -> dict[str, Any]:
    """Score val and test, and write their predictions."""
    results, columns = {}, []
    for part in ("val", "test"):
        if not len(task.parts.get(part, ())):
            continue
        target, table = task.targets[task.parts[part]], task.predict(part)
        results[part] = {
            "model": errors(target, table.prediction),
            **trivial_errors(target, train_targets),
        }
        columns.append(table.columns(target, part))
    write_table(
        folder / PREDICTIONS, {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
    )
    return results


def report_lines(results: dict[str, Any], unit: str | None) -> list[str]:
    """Return a small table of errors beside the trivial predictors', as lines of text."""
    unit = f" {unit}" if unit else ""
    return [
        f"{part:>4}: MAE {found['model']['mae']:.4g}{unit}, RMSE {found['model']['rmse']:.4g}{unit} "
        f"over {found['model']['count']} crystals; trivial MAE {found['mean']['mae']:.4g} (mean), "
        f"{found['median']['mae']:.4g} (median)"
        for part, found in results.items()
    ]
