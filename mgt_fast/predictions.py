"""Reading the predictions.csv of a fine-tuning run."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .inference import PREDICTION, REFERENCE

_VIEWS = ("se3_contribution", "so3_contribution")


@dataclass(frozen=True)
class ScoredPredictions:
    """Predictions of n crystals beside their targets.

    Attributes:
        ids, part: name and part of each crystal, (n,) object.
        reference, prediction: (n,) float64, in the target's units.
        contributions: shares of the SE(3) and the SO(3) view, (n, 2), or None for a network without a router.
        target, unit: what is predicted; unit None if it has none.
    """

    ids: np.ndarray
    part: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    contributions: np.ndarray | None
    target: str
    unit: str | None

    @property
    def error(self) -> np.ndarray:
        """Prediction minus reference, (n,)."""
        return self.prediction - self.reference


def read_predictions(path: str | Path) -> ScoredPredictions:
    """Read a table as `finetune` writes it, see `inference.PredictionTable.columns`.

    Raises:
        ValueError: if columns are missing or a value is no number; the message names file, line and column.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = list(csv.reader(file)) or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV table: {error}; restore it from a copy") from None
    reference, prediction = (
        next((name for name in header if name.startswith(f"{word} ")), None)
        for word in (REFERENCE, PREDICTION)
    )
    if not {"id", "part"} <= set(header) or reference is None or prediction is None:
        raise ValueError(
            f"{path} is no table of scored predictions: its columns are {', '.join(header) or 'none'}, "
            f"expected id, part, '{REFERENCE} ...' and '{PREDICTION} ...'; run the evaluation again"
        )
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} values for {len(header)} columns; the file is damaged, "
                "restore it from a copy"
            )
    views = set(_VIEWS) <= set(header)
    texts = dict(zip(header, np.array(rows, dtype=object).reshape(-1, len(header)).T, strict=True))

    def numbers(name: str) -> np.ndarray:
        try:
            return texts[name].astype(np.float64)
        except ValueError as error:
            raise ValueError(f"{path}, column {name!r}: {error}; restore the file from a copy") from None

    quantity = prediction.removeprefix(f"{PREDICTION} ")
    target, unit = re.fullmatch(r"(.*?)(?: \[([^][]*)\])?", quantity, re.DOTALL).groups()
    return ScoredPredictions(
        ids=texts["id"],
        part=texts["part"],
        reference=numbers(reference),
        prediction=numbers(prediction),
        contributions=np.stack([numbers(name) for name in _VIEWS], 1) if views else None,
        target=target,
        unit=unit,
    )
