"""Errors of a checkpoint on a part of a dataset, over every crystal of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import CrystalDataset
from ..data.manifest import hash_file
from ..distributed import Ranks
from ..inference import PredictionTable, predict_batches, prediction_meta
from ..model import MGT
from .batches import DataError, require_part, select_parts, target_values
from .config import DataConfig
from .feed import GraphSource
from .plan import batch_bounds
from .setup import manifest_digest
from .targets import errors

ALL = "all"
MAX_ATOMS = 4096
"""Atoms that are predicted at a time; more crystals would not be faster, and batches of a training that is
divided among many ranks would not fit one."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a part beside its targets.

    Attributes:
        table: predictions in the part's order.
        target: (n,) float64.
        missing: crystals of the part that have no target and were left out.
        caution: why the errors may be too small; None where nothing says so.
    """

    table: PredictionTable
    target: np.ndarray
    missing: int
    caution: str | None = None

    @property
    def errors(self) -> dict[str, float]:
        """MAE, RMSE and count; see `targets.errors`."""
        return errors(self.target, self.table.prediction)


def predict_part(
    model: MGT, source: GraphSource, indices: np.ndarray, batch_size: int, ranks: Ranks
) -> PredictionTable:
    """Predict crystals in batches that do not depend on the number of ranks, each of which takes its turn.

    Args:
        model: a network for prediction.
        source: builds the graphs.
        indices: the crystals, by position in the dataset, in the order of the table; at least one.
        batch_size: crystals at a time, at most; see also `MAX_ATOMS`.
        ranks: that share the work.

    Returns:
        The whole table, on every rank.

    Raises:
        ValueError: as `inference.predict_graphs`, on every rank (RankError where it happened on another).
    """
    bounds = _bounds(source.dataset.num_atoms[indices], batch_size)
    own = range(ranks.rank, len(bounds) - 1, ranks.size)
    graphs = (source.graph(indices[bounds[i] : bounds[i + 1]]) for i in own)
    with ranks.together():
        tables = predict_batches(model, graphs)
    everyone = ranks.gather(tables)
    return PredictionTable.concatenate(
        [everyone[i % ranks.size][i // ranks.size] for i in range(len(bounds) - 1)]
    )


def _bounds(num_atoms: np.ndarray, batch_size: int) -> np.ndarray:
    """Return where batches of crystals with so many atoms begin and end, (batches + 1,)."""
    full = np.cumsum(num_atoms, dtype=np.int64) // MAX_ATOMS
    by_atoms = 1 + np.flatnonzero(np.diff(full))
    return np.union1d(batch_bounds(len(num_atoms), batch_size), by_atoms)


def evaluate(
    model: MGT,
    dataset: CrystalDataset,
    part: str = "test",
    target: str | None = None,
    batch_size: int = 64,
    ranks: Ranks | None = None,
    split_file: Path | None = None,
) -> Evaluation:
    """Predict every crystal of a part that has a target.

    Args:
        model: a fine-tuned network with its metadata, from `MGT.load`.
        dataset: the crystals. If the network learned this target from random parts of this very dataset,
            `part` is drawn again in the same way; otherwise it is the split file's or the dataset's own.
        part: "train", "val", "test", "" (crystals of no part) or "all".
        target: the dataset's name of the target; None takes the checkpoint's.
        batch_size: crystals at a time.
        ranks: that share the work and all get the result; None for a single one.
        split_file: names the crystals of each part; see `config.DataConfig`.

    Raises:
        DataError: if target or part are missing, the units of checkpoint and dataset differ, the network
            has several outputs, or it learned this target from this dataset with a split file and none is
            given.
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
    if drawn_again and meta.split is not None and split_file is None and part != ALL:
        raise DataError(
            f"the network learned {name} from parts that a file named (SHA-256 {meta.split[:16]}…); pass "
            "that file (--split-file), since the dataset's own parts may hold what it has learned from"
        )
    fractions = meta.fractions if drawn_again and split_file is None else None
    data = DataConfig(fractions=fractions, split_file=split_file)
    caution = None
    seed = meta.seed if drawn_again and meta.seed is not None else 0
    if part == ALL:
        indices, missing = np.flatnonzero(known), int((~known).sum())
    else:
        parts = select_parts(dataset, data, seed, known)
        if drawn_again and split_file is not None and hash_file(split_file) != meta.split:
            caution = (
                f"the network learned {name} from other parts of this dataset than {split_file} names, so "
                f"{part!r} may hold crystals that it has learned from"
            )
        valid = [name or '""' for name, members in parts.items() if len(members)]
        indices = require_part(parts, part, "evaluate", f"choose {', '.join([*valid, ALL])}")
        everyone = select_parts(dataset, data, seed)
        missing = 0 if data.fractions else len(everyone[part]) - len(indices)
    if not len(indices):
        raise DataError(f"no crystal of the dataset has a {name}")
    device = next(model.parameters()).device
    source = GraphSource(
        dataset, meta.max_neighbors, meta.compat, device, shell_tolerance=meta.shell_tolerance
    )
    table = predict_part(model, source, indices, batch_size, ranks or Ranks())
    return Evaluation(table, targets[indices], missing, caution)
