"""Pretraining without labels: contrast between the views, and denoising of each view's geometry."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ..checkpoint import BEST, LAST, CheckpointMeta, save_checkpoint
from ..distributed import Ranks
from ..losses import denoising_losses, draw_noise, nt_xent_gradient, nt_xent_part
from ..model import MGT
from ..profiling import span
from .batches import require_part, require_two, select_parts
from .config import PretrainConfig
from .feed import BatchFeed, GraphSource
from .loop import Fit, FitResult
from .plan import BatchPlan
from .run import open_run
from .setup import (
    autocast,
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
from .step import Batch, Chunk, ChunkLoss, JointLoss, batch_losses
from .task import VALIDATION, GraphTask


class PretrainTask(GraphTask):
    """Fresh noise at every step; the held-out losses always see the same noise.

    Args:
        model, source, plan, config, ranks: see `GraphTask`.
        held_out: plan of the batches on which the losses are reported.
    """

    monitor = "val_loss"

    def __init__(
        self,
        model: MGT,
        source: GraphSource,
        plan: BatchPlan,
        held_out: BatchPlan,
        config: PretrainConfig,
        ranks: Ranks | None = None,
    ):
        super().__init__(model, source, plan, config, ranks)
        self.held_out = BatchFeed(source, held_out, self.ranks, config.seed, VALIDATION)
        self.compares_crystals = config.model.views == "both"

    def forward(self, batch: Batch, chunk: Chunk) -> ChunkLoss:
        """Compute a chunk's denoising losses, and the embeddings to be contrasted."""
        settings, denoising = self.config.pretraining, self.config.model.denoising
        with span("noise"):
            noise = draw_noise(chunk.graph, settings.noise_std, chunk.keys)
        with autocast(self.config, self.source.device) if self.model.training else nullcontext():
            output = self.model(chunk.graph, noise, chunk.keys)
        with span("loss"):
            losses = denoising_losses(
                output,
                chunk.graph,
                noise,
                denoising=denoising,
                noise_std=settings.noise_std,
                num_edges=batch.num_edges,
            )
            # Reported per crystal; the per-edge loss is an average already.
            share = batch.size if denoising == "crystal" else 1
            loss, figures = torch.zeros((), device=self.source.device), {}
            for view, weight, value in zip(
                ("se3", "so3"), (settings.se3_weight, settings.so3_weight), losses, strict=True
            ):
                if value is not None:
                    loss = loss + weight * value
                    figures[f"{view}_denoising"] = value.detach() / share
        embeddings = None
        if self.compares_crystals:
            embeddings = torch.stack((output.se3_proj, output.so3_proj)).float()
        return ChunkLoss(loss, figures, embeddings)

    def joint_loss(self, embeddings: torch.Tensor, ranks: Ranks, gradient: bool) -> JointLoss:
        """Contrast the two views of the crystals of a global batch, this rank's share of them with all."""
        settings = self.config.pretraining
        options = {"part": ranks.rank, "parts": ranks.size}
        weight = settings.contrastive_weight
        with span("loss"):
            if not gradient:
                loss = nt_xent_part(*embeddings, settings.temperature, **options)
                return JointLoss(weight * loss, None, {"contrastive": loss})
            loss, slope = nt_xent_gradient(*embeddings, settings.temperature, **options)
            return JointLoss(weight * loss, weight * slope, {"contrastive": loss})

    def validate(self) -> dict[str, float]:
        """Return the losses on the held-out part, averaged over its crystals."""
        self.model.eval()
        sums: dict[str, float] = {}
        for batch in self.ranks.in_step(self.held_out.batches(epoch=0)):
            for name, value in batch_losses(self, self.ranks, batch).items():
                sums[name] = sums.get(name, 0.0) + value * batch.size
        return {f"val_{name}": total / len(self.held_out.plan.crystals) for name, total in sums.items()}


def pretrain(
    config: PretrainConfig,
    folder: str | Path,
    console: Console,
    overwrite: bool = False,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    ranks: Ranks | None = None,
) -> FitResult:
    """Pretrain a network and leave its run folder behind: checkpoints, states, metrics, configuration.

    Args:
        config: the run.
        folder: the run folder.
        console: where progress goes.
        overwrite: replace the run that the folder may hold.
        resume: continue the run that the folder holds, bit for bit; see `run.open_run`.
        resume_from: step of the state to continue from; None takes the latest.
        ranks: of the run; None for a single one.

    Raises:
        DataError: if there are fewer than two crystals to learn from or none to hold out.
        MemoryBudgetError: if a crystal does not fit the memory.
        ConfigError, FileExistsError, FolderLockedError, CheckpointError: see `run.open_run`,
            `loop.Fit.resume`.
        NonFiniteLossError, RunStoppedError, RankError: see `loop.Fit.run`.
    """
    ranks = ranks or Ranks()
    device = start_torch(config)
    task, sizes = pretraining_task(config, device, ranks, console)
    digest, split = manifest_digest(task.source.dataset), split_digest(config, ranks)
    with open_run(folder, config, console, ranks, overwrite, resume) as run:
        run.log.say(
            f"pretraining on {sum(sizes.values())} crystals ({describe_parts(sizes)}) "
            f"on {describe_device(device, ranks)}; "
            f"losses reported on {len(task.held_out.plan.crystals)} of {config.data.held_out!r}"
        )

        def save(epoch: int, metrics: dict[str, float], improved: bool) -> None:
            meta = CheckpointMeta(
                model=config.model,
                max_neighbors=config.data.max_neighbors,
                compat=config.data.compat,
                shell_tolerance=config.data.shell_tolerance,
                dataset=digest,
                split=split,
                epoch=epoch,
                metrics=metrics,
            )
            for name in (LAST, BEST) if improved else (LAST,):
                save_checkpoint(run.folder / name, task.model, meta)

        fit = Fit(
            task,
            config.optim,
            run.log,
            save,
            ranks=ranks,
            store=run.store,
            checkpoint=config.checkpoint,
            dataset=crystals_digest(digest, split),
            attached=[run.folder / BEST],
        )
        result = run.fit(fit, resume_from)
        run.log.write_results(
            {"epochs": result.epochs, "best_epoch": result.best_epoch, "val_loss": result.best}
        )
        run.log.say(
            f"best val_loss {result.best:.4g} in epoch {result.best_epoch}; checkpoints in {run.folder}"
        )
    return result


def pretraining_task(
    config: PretrainConfig, device: torch.device, ranks: Ranks, console: Console | None = None
) -> tuple[PretrainTask, dict[str, int]]:
    """Return a fresh network with its crystals, and how many of these come from each part."""
    dataset = open_dataset(config.data.path, ranks)
    parts = select_parts(dataset, config.data, config.seed)
    held_out = require_part(parts, config.data.held_out, "hold out")
    for name in config.data.train:
        if name or len(config.data.train) == 1:  # crystals of no part are welcome, but there need be none
            require_part(parts, name, "learn from")
    chosen = {name: parts[name] for name in config.data.train if len(parts.get(name, ()))}
    train = np.sort(np.concatenate(list(chosen.values())))
    require_two(dataset, train)
    edges = planned_edges(config, dataset, np.concatenate((train, held_out)), ranks, console)
    source = graph_source(config, dataset, device, np.concatenate((train, held_out)), ranks)
    common = {
        "batch_size": config.optim.batch_size,
        "num_ranks": ranks.size,
        "budget": memory_budget(config, device, ranks, source.resident_bytes),
        "names": dataset.ids,
    }
    plan = BatchPlan(train, edges[train], seed=config.seed, smallest=2, **common)
    unshuffled = BatchPlan(
        held_out, edges[held_out], part=f"held-out part {config.data.held_out!r}", **common
    )
    model = MGT(config.model, backend=config.backend).to(device)
    task = PretrainTask(model, source, plan, unshuffled, config, ranks)
    return task, {name: len(part) for name, part in chosen.items()}
