"""Pretraining without labels: contrast between the views, and denoising of each view's geometry."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..checkpoint import BEST, LAST, CheckpointMeta, save_checkpoint
from ..data import CrystalDataset
from ..graph import CrystalGraph
from ..losses import PretrainingLoss, draw_noise, pretraining_loss
from ..model import MGT
from .batches import GraphSource, require_part, require_two, select_parts, shuffled_batches, split_evenly
from .config import PretrainConfig
from .loop import FitResult, fit
from .runlog import RunLog
from .setup import autocast, describe_parts, manifest_digest, start_torch


class PretrainTask:
    """Fresh noise at every step; the held-out losses always see the same noise."""

    monitor = "val_loss"

    def __init__(
        self,
        model: MGT,
        source: GraphSource,
        train: np.ndarray,
        held_out: np.ndarray,
        config: PretrainConfig,
    ):
        self.model, self.source, self.train, self.held_out = model, source, train, held_out
        self.config = config
        self.steps_per_epoch = len(split_evenly(len(train), config.optim.batch_size, smallest=2))
        self.generator = torch.Generator(source.device).manual_seed(config.seed)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the training crystals in shuffled batches."""
        return shuffled_batches(self.train, self.config.optim.batch_size, self.config.seed, epoch)

    def graph(self, indices: np.ndarray) -> CrystalGraph:
        """Build the graphs of a batch."""
        return self.source.graph(indices)

    def loss(self, indices: np.ndarray, graph: CrystalGraph) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the pretraining loss and its parts."""
        loss = self._losses(graph, self.generator)
        return loss.total, self._parts(loss, graph)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Return the losses on the held-out part, averaged over its crystals."""
        self.model.eval()
        generator = torch.Generator(self.source.device).manual_seed(self.config.seed)
        sums: dict[str, float] = {}
        for graph in self.source.in_order(self.held_out, self.config.optim.batch_size):
            loss = self._losses(graph, generator)
            for name, value in {"loss": loss.total, **self._parts(loss, graph)}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * graph.num_crystals
        return {f"val_{name}": total / len(self.held_out) for name, total in sums.items()}

    def _losses(self, graph: CrystalGraph, generator: torch.Generator) -> PretrainingLoss:
        settings = self.config.pretraining
        noise = draw_noise(graph, settings.noise_std, generator)
        with autocast(self.config, self.source.device) if self.model.training else nullcontext():
            output = self.model(graph, noise)
        return pretraining_loss(
            output,
            graph,
            noise,
            denoising=self.config.model.denoising,
            noise_std=settings.noise_std,
            temperature=settings.temperature,
            weights=(settings.contrastive_weight, settings.se3_weight, settings.so3_weight),
        )

    def _parts(self, loss: PretrainingLoss, graph: CrystalGraph) -> dict[str, torch.Tensor]:
        """Return the parts of a loss; denoising per crystal, or per edge in units of the noise's variance."""
        share = graph.num_crystals if self.config.model.denoising == "crystal" else 1
        parts = {
            "contrastive": loss.contrastive,
            "se3_denoising": None if loss.se3_denoising is None else loss.se3_denoising / share,
            "so3_denoising": None if loss.so3_denoising is None else loss.so3_denoising / share,
        }
        return {name: value.detach() for name, value in parts.items() if value is not None}


def pretrain(
    config: PretrainConfig, folder: str | Path, console: Console, overwrite: bool = False
) -> FitResult:
    """Pretrain a network and leave its run folder behind: best and last checkpoint, metrics, configuration.

    Args:
        config: the run.
        folder: the run folder.
        console: where progress goes.
        overwrite: replace the run that the folder may hold.

    Raises:
        DataError: if there are fewer than two crystals to learn from or none to hold out.
        NonFiniteLossError: see `loop.fit`.
    """
    device = start_torch(config)
    dataset = CrystalDataset.open(config.data.path)
    parts = select_parts(dataset, config.data, config.seed)
    held_out = require_part(parts, config.data.held_out, "hold out")
    for name in config.data.train:
        if name or len(config.data.train) == 1:  # crystals of no part are welcome, but there need be none
            require_part(parts, name, "learn from")
    chosen = {name: parts[name] for name in config.data.train if len(parts.get(name, ()))}
    train = np.sort(np.concatenate(list(chosen.values())))
    require_two(dataset, train)
    source = GraphSource(dataset, config.data.max_neighbors, config.data.compat, device)
    model = MGT(config.model, backend=config.backend).to(device)
    digest = manifest_digest(dataset)
    task = PretrainTask(model, source, train, held_out, config)
    with RunLog(folder, config, console, overwrite) as log:
        sizes = {name: len(part) for name, part in chosen.items()}
        log.say(
            f"pretraining on {len(train)} crystals ({describe_parts(sizes)}) on {device}; "
            f"losses reported on {len(held_out)} of {config.data.held_out!r}"
        )

        def save(epoch: int, metrics: dict[str, float], improved: bool) -> None:
            meta = CheckpointMeta(
                model=config.model,
                max_neighbors=config.data.max_neighbors,
                compat=config.data.compat,
                dataset=digest,
                epoch=epoch,
                metrics=metrics,
            )
            for name in (LAST, BEST) if improved else (LAST,):
                save_checkpoint(log.folder / name, model, meta)

        result = fit(task, config.optim, log, save)
        log.write_results({"epochs": result.epochs, "best_epoch": result.best_epoch, "val_loss": result.best})
        log.say(f"best val_loss {result.best:.4g} in epoch {result.best_epoch}; checkpoints in {log.folder}")
    return result
