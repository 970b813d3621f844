"""Errors of predictions, and what a trivial predictor would reach."""

from __future__ import annotations

import numpy as np


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
