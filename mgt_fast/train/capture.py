"""Training steps replayed as CUDA graphs, for small batches whose kernels end sooner than they are started.

A captured step repeats the same kernels at the same addresses, so batches are padded to few sizes (see
`padding`) and copied into arrays that stay. The first batch of a size is an ordinary step, which also loads
the kernels and makes the optimiser's state; the second is captured; from then on two replays make a step: one
for the gradients, one for the update, between which the loop looks whether the loss is finite. What the
parameters, the running statistics and the optimiser hold is updated in place, and the keys that decide
dropout are copied with the batch.

No GPU has run this yet.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from ..graph import CrystalGraph
from ..kernels import resolve_backend
from ..padding import bucket, pad_graph
from .step import Batch, StepResult, TrainingStep

MAX_BUCKETS = 64
"""Sizes kept, the ones used last; each holds the input arrays and two CUDA graphs, but shares the memory
that these work in."""


class PaddableTask(Protocol):
    """A task whose loss leaves the filler of padded graphs out.

    Attributes:
        model: the network.
        largest_batch: crystals in a batch, at most.
    """

    model: torch.nn.Module
    largest_batch: int

    def batch_targets(self, indices: np.ndarray) -> torch.Tensor:
        """Return what the network shall predict for a batch, (B,) on the CPU."""

    def loss_of(
        self, graph: CrystalGraph, targets: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of a batch and figures from tensors alone; filler crystals do not count.

        The keys (B,) decide dropout.
        """


@dataclass
class _Bucket:
    """Input arrays of one size, and what was captured over them."""

    graph: CrystalGraph
    targets: torch.Tensor
    keys: torch.Tensor
    warm: bool = False
    gradients: torch.cuda.CUDAGraph | None = None
    update: torch.cuda.CUDAGraph | None = None
    result: StepResult | None = None

    def fill(self, graph: CrystalGraph, targets: torch.Tensor, keys: torch.Tensor):
        """Copy another batch into the arrays."""
        for field in fields(graph):
            value = getattr(graph, field.name)
            if isinstance(value, torch.Tensor):
                getattr(self.graph, field.name).copy_(value)
        self.targets.copy_(targets)
        self.keys.copy_(keys)


class PaddedStep(TrainingStep):
    """A training step over padded batches in arrays that stay; on any device, and nothing is captured.

    Args:
        task: what is trained.
        weight_decay, grad_clip: see `TrainingStep`.
    """

    def __init__(self, task: PaddableTask, weight_decay: float = 0.01, grad_clip: float | None = None):
        super().__init__(task, weight_decay, grad_clip)
        self.device = self.parameters[0].device
        self.num_crystals = task.largest_batch + 1  # the last is filler
        self.buckets: OrderedDict[tuple[int, int], _Bucket] = OrderedDict()

    def gradients(self, batch: Batch, votes: Sequence[float] = ()) -> StepResult:
        """Compute the clipped gradients of a batch; the weights stay as they are.

        Args:
            batch: one chunk; its graph is best on the CPU.
            votes: see `TrainingStep.gradients`; a single rank needs none.

        Raises:
            ValueError: if there are fewer than two atoms or edges, over which there are no statistics; if the
                batch does not fit the memory as a whole.
        """
        return self._compute(self._load(batch))

    def _load(self, batch: Batch) -> _Bucket:
        """Pad a batch and bring it into the arrays of its size."""
        if batch.chunked or batch.recompute:
            raise ValueError(
                f"a batch of {batch.num_edges} edges exceeds the memory budget, and captured steps take it "
                "as a whole; set capture=false, a smaller optim.batch_size or a larger memory_gib"
            )
        (chunk,) = batch.chunks
        graph = chunk.graph
        if min(graph.num_atoms, graph.num_edges) < 2:
            raise ValueError(
                f"{graph.num_atoms} atoms and {graph.num_edges} edges: batch statistics need at least 2 "
                f"rows; crystals of the batch: {', '.join(graph.ids)}"
            )
        size = bucket(graph)
        padded = replace(pad_graph(graph, *size, self.num_crystals), ids=())
        targets, keys = (
            torch.cat((values, values.new_zeros(self.num_crystals - len(values))))
            for values in (self.task.batch_targets(chunk.crystals), chunk.keys)
        )
        if size in self.buckets:
            self.buckets[size].fill(padded, targets, keys)
            self.buckets.move_to_end(size)
        else:
            arrays = padded.to(device=self.device), targets.to(self.device), keys.to(self.device)
            self.buckets[size] = _Bucket(*arrays)
            if len(self.buckets) > MAX_BUCKETS:
                self.buckets.popitem(last=False)
        return self.buckets[size]

    def _compute(self, batch: _Bucket) -> StepResult:
        self.optimizer.zero_grad()
        loss, figures = self.task.loss_of(batch.graph, batch.targets, batch.keys)
        loss.backward()
        return self._reduced({"loss": loss.detach(), **figures})


class CapturedStep(PaddedStep):
    """A training step of two CUDA graph replays.

    Args:
        task: what is trained.
        weight_decay, grad_clip: see `TrainingStep`.

    Raises:
        ValueError: if the network is not on a CUDA device or does not compute with Triton; nothing else can
            be captured.
    """

    def __init__(self, task: PaddableTask, weight_decay: float = 0.01, grad_clip: float | None = None):
        device = next(task.model.parameters()).device
        backend = resolve_backend(task.model.backend, device)
        if device.type != "cuda" or backend != "triton":
            raise ValueError(
                "CUDA graphs need a CUDA device and the Triton backend, but the network computes on "
                f"{device} with backend {backend}; train without capture"
            )
        self.lr = torch.zeros((), device=device)  # where a captured update reads it
        super().__init__(task, weight_decay, grad_clip)
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()
        self.batch: _Bucket | None = None

    def _adamw(self, weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            self.parameters, lr=self.lr, weight_decay=weight_decay, fused=True, capturable=True
        )

    def gradients(self, batch: Batch, votes: Sequence[float] = ()) -> StepResult:
        """Compute the clipped gradients of a batch; see `PaddedStep.gradients`."""
        self.batch = batch = self._load(batch)
        if not batch.warm:
            batch.warm = True
            with self._aside():
                return self._compute(batch)
        if batch.gradients is None:
            self._capture(batch)
        batch.gradients.replay()
        return batch.result

    def update(self, lr: float):
        """Move the weights by the gradients computed last."""
        self.lr.fill_(lr)
        if self.batch.update is not None:
            self.batch.update.replay()
            return
        with self._aside(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This instance was constructed with capturable=True")
            self.optimizer.step()

    def _capture(self, batch: _Bucket):
        """Record both halves of a step; nothing is computed."""
        self.optimizer.zero_grad()
        gradients, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Graphs share a pool: none keeps anything there between its replay and another's but its results,
        # and gradients, whose update follows at once.
        with torch.cuda.graph(gradients, pool=self.pool, stream=self.stream):
            batch.result = self._compute(batch)
        with torch.cuda.graph(update, pool=self.pool, stream=self.stream):
            self.optimizer.step()
        batch.gradients, batch.update = gradients, update

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run ordinary kernels on the stream that captures, as autograd wants it."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
