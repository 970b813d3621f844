"""The moving average of a network's weights, which is scored and saved in place of the last step's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

AVERAGE = "average."  # prefix of the average's tensors in a state


class WeightAverage:
    """Exponential moving average of a network's parameters and running statistics.

    After step t the average moves by 1 − min(decay, (1 + t) / (10 + t)) towards the network: the first steps'
    weights, of which there are few, are soon forgotten. Counters are taken over as they are.

    Args:
        model: the network, on its device; its weights now are the average's first.
        decay: share of the average that a step keeps, in (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        real, targets = [], []
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                real.append(self.values[name])
                targets.append(value)
            else:
                self.values[name].copy_(value)
        torch._foreach_lerp_(real, targets, share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average into the network, and the network's own weights back afterwards."""
        own = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(own)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what `restore` takes, as tensors of a run's state."""
        return {AVERAGE + name: value for name, value in self.values.items()}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from the average of a saved state."""
        for name, value in self.values.items():
            value.copy_(tensors[AVERAGE + name])

    @torch.no_grad()
    def _fill(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in self.model.state_dict().items():
            value.copy_(values[name])  # in place: captured steps read the same addresses
