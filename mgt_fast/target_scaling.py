"""The map between a target in its own units and what a network learns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TRANSFORMS = ("none", "log")


@dataclass(frozen=True)
class TargetScaling:
    """(t − mean) / std, where t is a target or its logarithm.

    Attributes:
        mean, std: of t over the training targets; 0 and 1 leave t as it is.
        transform: "none": t is the target; "log": its natural logarithm.
    """

    mean: float = 0.0
    std: float = 1.0
    transform: str = "none"

    @classmethod
    def fit(cls, values: np.ndarray, transform: str = "none") -> TargetScaling:
        """Take mean and standard deviation of training targets, (n,).

        Raises:
            ValueError: if the targets are all alike.
        """
        transformed = cls(transform=transform).scale(np.asarray(values))
        mean, std = float(np.mean(transformed)), float(np.std(transformed))
        if not std > 0:
            raise ValueError(
                f"all {len(values)} training targets equal {values[0]:g}: there is nothing to learn; "
                "choose another target or set data.scale_target=false"
            )
        return cls(mean, std, transform)

    def scale(self, values: np.ndarray) -> np.ndarray:
        """Map targets to what the network learns."""
        if self.transform == "log":
            values = np.log(values)
        return (values - self.mean) / self.std

    def unscale(self, values):
        """Map the network's output, an array or a tensor, back to the target's units."""
        values = values * self.std + self.mean
        if self.transform == "log":
            return values.exp() if isinstance(values, torch.Tensor) else np.exp(values)
        return values
