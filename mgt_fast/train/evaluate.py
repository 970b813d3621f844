"""Errors of a checkpoint on a part of a dataset, over every crystal of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..data import CrystalDataset
from ..inference import PredictionTable, predict_graphs, prediction_meta
from ..model import MGT
from .batches import DataError, GraphSource, require_part, select_parts, target_values
from .config import DataConfig
from .setup import manifest_digest
from .targets import errors

ALL = "all"


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a part beside its targets.

    Attributes:
        table: predictions in the part's order.
        target: (n,) float64.
        missing: crystals of the part that have no target and were left out.
    """

    table: PredictionTable
    target: np.ndarray
    missing: int

    @property
    def errors(self) -> dict[str, float]:
        """MAE, RMSE and count; see `targets.errors`."""
        return errors(self.target, self.table.prediction)


def evaluate(
    model: MGT, dataset: CrystalDataset, part: str = "test", target: str | None = None, batch_size: int = 64
) -> Evaluation:
    """Predict every crystal of a part that has a target.

    Args:
        model: a fine-tuned network with its metadata, from `MGT.load`.
        dataset: the crystals. If the network learned this target from random parts of this very dataset,
            `part` is drawn again in the same way; otherwise it is the dataset's own.
        part: "train", "val", "test", "" (crystals of no part) or "all".
        target: the dataset's name of the target; None takes the checkpoint's.
        batch_size: crystals at a time.

    Raises:
        DataError: if target or part are missing, the units of checkpoint and dataset differ, or the network
            has several outputs.
    """
    meta = prediction_meta(model)
    name = target or meta.target
    if model.config.output_dim != 1:
        raise DataError(f"the network has {model.config.output_dim} outputs; only one target is evaluated")
    if name is None:
        raise DataError("the checkpoint does not say what it predicts; name the dataset's column (--target)")
    targets = target_values(dataset, name)
    unit = dataset.target_units[name]
    if unit and meta.unit and unit != meta.unit:
        raise DataError(f"the checkpoint predicts {meta.unit}, but the dataset's {name} is in {unit}")
    known = ~np.isnan(targets)
    drawn_again = name == meta.target and meta.dataset == manifest_digest(dataset)
    data = DataConfig(fractions=meta.fractions if drawn_again else None)
    seed = meta.seed if drawn_again and meta.seed is not None else 0
    if part == ALL:
        indices, missing = np.flatnonzero(known), int((~known).sum())
    else:
        parts = select_parts(dataset, data, seed, known)
        valid = [name or '""' for name, members in parts.items() if len(members)]
        indices = require_part(parts, part, "evaluate", f"choose {', '.join([*valid, ALL])}")
        missing = 0 if data.fractions else int((~known & (dataset.split == part)).sum())
    if not len(indices):
        raise DataError(f"no crystal of the dataset has a {name}")
    device = next(model.parameters()).device
    source = GraphSource(dataset, meta.max_neighbors, meta.compat, device)
    table = predict_graphs(model, source.in_order(indices, batch_size))
    return Evaluation(table, targets[indices], missing)
