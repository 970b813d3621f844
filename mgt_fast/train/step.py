"""One training step: the gradients of a batch, and the update they make."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..graph import CrystalGraph


@dataclass(frozen=True)
class StepResult:
    """What a step found: the loss, the norm of the whole gradient before clipping, and the task's figures."""

    loss: torch.Tensor
    norm: torch.Tensor
    figures: dict[str, torch.Tensor]


class TrainingStep:
    """Forward and backward pass, gradient clipping and AdamW.

    Args:
        task: see `loop.Task`; of it, `model` and `loss` are used.
        weight_decay: AdamW's decoupled weight decay.
        grad_clip: largest norm of the whole gradient; None does not clip.
    """

    def __init__(self, task, weight_decay: float = 0.01, grad_clip: float | None = None):
        self.task = task
        self.parameters = list(task.model.parameters())
        self.max_norm = math.inf if grad_clip is None else grad_clip
        self.optimizer = self._adamw(weight_decay)

    def gradients(self, indices: np.ndarray, graph: CrystalGraph) -> StepResult:
        """Compute the clipped gradients of a batch; the weights stay as they are."""
        return self._backward(*self.task.loss(indices, graph))

    def update(self, lr: float):
        """Move the weights by the gradients computed last."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _adamw(self, weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.parameters, weight_decay=weight_decay, fused=True)

    def _backward(self, loss: torch.Tensor, figures: dict[str, torch.Tensor]) -> StepResult:
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        return StepResult(loss.detach(), norm, figures)
