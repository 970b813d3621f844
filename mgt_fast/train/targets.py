"""Targets: scaling, errors of predictions, and what a trivial predictor would reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TargetScaling:
    """The affine map between a target in its own units and what the network learns.

    Attributes:
        mean, std: of the training targets; 0 and 1 leave targets as they are.
    """

    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def fit(cls, values: np.ndarray) -> TargetScaling:
        """Take mean and standard deviation of training targets, (n,).

        Raises:
            ValueError: if the targets are all alike.
        """
        mean, std = float(np.mean(values)), float(np.std(values))
        if not std > 0:
            raise ValueError(
                f"all {len(values)} training targets equal {mean:g}: there is nothing to learn; "
                "choose another target or set data.scale_target=false"
            )
        return cls(mean, std)

    def scale(self, values):
        """Map targets to what the network learns."""
        return (values - self.mean) / self.std

    def unscale(self, values):
        """Map the network's output back to the target's units."""
        return values * self.std + self.mean


def errors(target: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    """Return "mae", "rmse" and "count" over every sample; both arrays are (n,)."""
    difference = np.asarray(prediction, np.float64) - np.asarray(target, np.float64)
    return {
        "mae": float(np.abs(difference).mean()),
        "rmse": float(np.sqrt(np.square(difference).mean())),
        "count": len(difference),
    }


def trivial_errors(target: np.ndarray, training_targets: np.ndarray) -> dict[str, dict[str, float]]:
    """Return the errors of always predicting the training "mean" or "median"."""
    return {
        name: errors(target, np.full(len(target), guess))
        for name, guess in (
            ("mean", np.mean(training_targets)),
            ("median", np.median(training_targets)),
        )
    }
