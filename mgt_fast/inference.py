"""From crystals to a table of predictions in the target's units."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from rich.console import Console

from .checkpoint import CheckpointMeta
from .data import CrystalDataset
from .data.ingest import CHUNK_SIZE, LONGEST_VALUE, chunks
from .data.parse import ParseOptions, parse_all
from .data.readers.inputs import Inputs
from .data.store import MANIFEST
from .distributed import Ranks
from .graph import CrystalGraph, network_input
from .memory import memory_limit
from .model import MGT
from .structures import CrystalBatch

REFERENCE, PREDICTION = "reference", "prediction"  # first words of a table's columns

NUMBERS_PER_EDGE = 15
"""Numbers an edge and channel that a prediction holds at its peak; tests compare it with what a CPU takes."""


class TooLargeError(ValueError):
    """Crystals whose prediction would not fit the memory."""


@dataclass(frozen=True)
class PredictionTable:
    """Predictions of n crystals.

    Attributes:
        ids: one name a crystal.
        prediction: (n,) float64 in the target's units; (n, output_dim) for a network of several outputs.
        contributions: shares of the SE(3) and the SO(3) view in each prediction, (n, 2), or None where the
            network has no router.
        target, unit: what is predicted; None if the checkpoint does not say.
    """

    ids: tuple[str, ...]
    prediction: np.ndarray
    contributions: np.ndarray | None
    target: str | None = None
    unit: str | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> str:
        """Name of the predicted quantity with its unit, as "band_gap [eV]"."""
        name = self.target or "prediction"
        return f"{name} [{self.unit}]" if self.unit else name

    def columns(self, reference: np.ndarray | None = None, part: str | None = None) -> dict[str, np.ndarray]:
        """Return the table's columns by name, as "prediction band_gap [eV]".

        The target stands behind "reference" or "prediction", so that whatever its name, no two columns have
        the same.

        Args:
            reference: the true values, (n,), in the target's units; None leaves the column out.
            part: of the dataset, the same for all crystals; None leaves the column out.

        Returns:
            id, part, reference, prediction(s), contributions of the views.
        """
        columns = {"id": np.array(self.ids, dtype=object)}
        if part is not None:
            columns["part"] = np.full(len(self), part, dtype=object)
        quantity = f" {self.target}" if self.target else ""
        quantity += f" [{self.unit}]" if self.unit else ""
        if reference is not None:
            columns[f"{REFERENCE}{quantity}"] = reference
        if self.prediction.ndim == 1:
            columns[f"{PREDICTION}{quantity}"] = self.prediction
        else:
            columns |= {f"{PREDICTION}{quantity} {k}": values for k, values in enumerate(self.prediction.T)}
        if self.contributions is not None:
            columns |= {
                "se3_contribution": self.contributions[:, 0],
                "so3_contribution": self.contributions[:, 1],
            }
        return columns

    def write(self, path: str | Path) -> None:
        """Write the table as .csv or .parquet."""
        write_table(path, self.columns())

    @classmethod
    def concatenate(cls, tables: Sequence[PredictionTable]) -> PredictionTable:
        """Join tables of one model; there must be at least one."""
        first = tables[0]
        return cls(
            ids=tuple(name for table in tables for name in table.ids),
            prediction=np.concatenate([table.prediction for table in tables]),
            contributions=None
            if first.contributions is None
            else np.concatenate([table.contributions for table in tables]),
            target=first.target,
            unit=first.unit,
        )


def check_table_path(path: str | Path) -> Path:
    """Return `path` if `write_table` can write it.

    Raises:
        ValueError: if its suffix is neither .csv nor .parquet.
    """
    path = Path(path)
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(
            f"{path}: tables are written as .csv or .parquet, not as {path.suffix or 'a bare name'}"
        )
    return path


def check_new_table(path: str | Path, overwrite: bool) -> Path:
    """Return `path` if a table may be written there, to be asked before the work.

    Raises:
        ValueError: as `check_table_path`.
        FileNotFoundError: if its folder is missing.
        FileExistsError: if it exists and `overwrite` is false.
    """
    path = check_table_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name or pass --overwrite")
    return path


def write_table(path: str | Path, columns: dict[str, np.ndarray]) -> None:
    """Write equally long columns as .csv or .parquet; the suffix decides."""
    path = check_table_path(path)
    table = pa.table(columns)
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pa.parquet.write_table(table, path)


def prediction_meta(model: MGT) -> CheckpointMeta:
    """Return a model's metadata; one that came from no checkpoint predicts what its output layer gives.

    Raises:
        ValueError: if the model is one for pretraining.
    """
    if model.config.task != "predict":
        raise ValueError("this network was pretrained and predicts no property yet; fine-tune it first")
    return getattr(model, "meta", None) or CheckpointMeta(model=model.config)


def predict_graphs(model: MGT, graphs: Iterable[CrystalGraph]) -> PredictionTable:
    """Predict the crystals of some batches of graphs as one table; see `predict_batches`.

    Raises:
        ValueError: as `predict_batches`; if there is no crystal.
    """
    tables = predict_batches(model, graphs)
    if not tables:
        raise ValueError("no crystals to predict")
    return PredictionTable.concatenate(tables)


@torch.no_grad()
def predict_batches(model: MGT, graphs: Iterable[CrystalGraph]) -> list[PredictionTable]:
    """Predict the crystals of some batches of graphs, in eval mode; one table a batch.

    Args:
        model: a network for prediction; its mode is left as it was.
        graphs: batches on the model's device, in its floating-point type.

    Raises:
        ValueError: if the network is one for pretraining, or a prediction is not finite; the message names
            the crystals.
    """
    meta = prediction_meta(model)
    was_training = model.training
    model.eval()
    try:
        return [_predict_graph(model, graph, meta) for graph in graphs]
    finally:
        model.train(was_training)


def _predict_graph(model: MGT, graph: CrystalGraph, meta: CheckpointMeta) -> PredictionTable:
    output = model(graph)
    prediction = meta.scaling.unscale(output.prediction.double().cpu().numpy())
    bad = np.flatnonzero(~np.isfinite(prediction).all(axis=1))
    if bad.size:
        names = ", ".join(graph.ids[b] for b in bad)
        raise ValueError(f"predictions are not finite for {names}; are their cells and atoms sensible?")
    contributions = output.contributions
    return PredictionTable(
        ids=tuple(graph.ids),
        prediction=prediction[:, 0] if prediction.shape[1] == 1 else prediction,
        contributions=None if contributions is None else contributions.double().cpu().numpy(),
        target=meta.target,
        unit=meta.unit,
    )


def predict_crystals(
    model: MGT, batches: Iterable[CrystalBatch], memory: float | None = None
) -> PredictionTable:
    """Build the graphs the checkpoint prescribes and predict; see `predict_graphs`.

    Args:
        model: a network for prediction.
        batches: of crystals.
        memory: bytes that a batch may take; None for a share of the device's, see `memory.memory_limit`.

    Raises:
        TooLargeError: for a batch that would take more, before its graphs are built or right after.
        TypeError, ValueError: as `network_input` and `predict_graphs`.
    """
    meta = prediction_meta(model)
    parameter = next(model.parameters())
    limit = memory_limit(parameter.device) if memory is None else memory
    bytes_per_edge = NUMBERS_PER_EDGE * model.config.channels * parameter.dtype.itemsize

    def check(crystals: CrystalBatch, num_edges: int) -> None:
        needed = num_edges * bytes_per_edge
        if needed > limit:
            names = ", ".join(crystals.ids[:3]) + ", ..." * (len(crystals) > 3)
            raise TooLargeError(
                f"to predict {names} with {num_edges} edges takes about {needed / 2**30:.3g} GiB, "
                f"{limit / 2**30:.3g} GiB are allowed; predict fewer crystals at a time, or raise the limit "
                "(--memory-gib, memory=)"
            )

    def graph(crystals: CrystalBatch) -> CrystalGraph:
        check(crystals, len(crystals.numbers) * meta.max_neighbors)  # there are at least so many
        built = network_input(
            crystals,
            parameter.device,
            parameter.dtype,
            max_neighbors=meta.max_neighbors,
            compat=meta.compat,
            shell_tolerance=meta.shell_tolerance,
        )
        check(crystals, built.num_edges)
        return built

    return predict_graphs(model, map(graph, batches))


def predict_structures(
    model: MGT,
    structures: Sequence,
    ids: Sequence[str] | None = None,
    batch_size: int = 64,
    memory: float | None = None,
) -> PredictionTable:
    """Predict pymatgen Structures and ASE Atoms (they may be mixed).

    Args:
        model: a network for prediction, usually from `MGT.load`.
        structures: the crystals.
        ids: one name a crystal; "0", "1", ... when absent.
        batch_size: crystals at a time.
        memory: bytes that they may take; see `predict_crystals`.

    Raises:
        TypeError, ValueError: for a single structure, for more or fewer ids than structures, and as
            `CrystalBatch.from_structures` and `predict_crystals`.
    """
    if hasattr(structures, "frac_coords") or hasattr(structures, "get_scaled_positions"):
        raise TypeError(f"structures is a single {type(structures).__name__}; pass a list of them")
    if ids is None:
        ids = [str(i) for i in range(len(structures))]
    if len(ids) != len(structures):
        raise ValueError(f"{len(ids)} ids were given for {len(structures)} structures")
    return predict_crystals(
        model,
        (
            CrystalBatch.from_structures(structures[i : i + batch_size], ids[i : i + batch_size])
            for i in range(0, len(structures), batch_size)
        ),
        memory,
    )


@dataclass(frozen=True)
class Reject:
    """A crystal that was not predicted: where it came from, and why not.

    Attributes:
        source: the file, or the dataset.
        id: the crystal's name.
        reason: a short code; those of reading are `data.prepare`'s, after it come "too_large" (for memory)
            and "no_prediction".
        value: what is at fault.
        message: the same in words.
    """

    source: str
    id: str
    reason: str
    value: str
    message: str


def predict_dataset(
    model: MGT, dataset: CrystalDataset, batch_size: int = 64, memory: float | None = None
) -> tuple[PredictionTable | None, list[Reject]]:
    """Predict every crystal of a dataset; one that cannot be predicted does not stop the others.

    Returns:
        The predictions in the dataset's order, None if there are none; and the crystals left out.
    """
    return _collect([_predict_rows(model, dataset, _batches(dataset, batch_size), memory)])


def predict_paths(
    model: MGT,
    paths: Sequence[str | Path],
    batch_size: int = 64,
    workers: int | None = None,
    console: Console | None = None,
    ranks: Ranks | None = None,
    memory: float | None = None,
) -> tuple[PredictionTable | None, list[Reject]]:
    """Predict the crystals of files, folders, archives (all that `data.prepare` reads) and datasets.

    Crystals of one name, such as those of a/POSCAR and b/POSCAR, are all predicted; their ids are then where
    they come from (file and row in it, or dataset and name).

    Args:
        model: a network for prediction.
        paths: where the crystals are; a path given twice counts once.
        batch_size: crystals at a time.
        workers: processes that read files; None for one a core, 0 for none (see `data.prepare`).
        console: where progress and files without crystals are reported; None for nowhere.
        ranks: that take turns at the batches and all get the result; None for a single one.
        memory: bytes that a batch may take; see `predict_crystals`.

    Returns:
        The predictions, None if there are none; and the records left out.

    Raises:
        PrepareError, DatasetError: if a path is missing or of an unknown format.
    """
    prediction_meta(model)  # complains before anything is read
    ranks = ranks or Ranks()
    unique = list(dict.fromkeys(map(Path, paths)))
    is_dataset = [(path / MANIFEST).is_file() for path in unique]
    files = [path for path, is_one in zip(unique, is_dataset, strict=True) if not is_one]
    results: list[tuple[int, _Result]] = []
    with ranks.together():
        datasets = [CrystalDataset.open(path) for path in itertools.compress(unique, is_dataset)]
        inputs = Inputs(files) if files else None
        with nullcontext() if console is None else console.status("predicting") as status:
            for result in _own_results(model, datasets, inputs, batch_size, workers, ranks, memory):
                results.append(result)
                if status is not None:
                    done = sum(len(sources) for _, (_, sources, _) in results)
                    status.update(f"{done * ranks.size} crystals predicted")
    for note in inputs.notes if inputs and console is not None else ():
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    everyone = itertools.chain.from_iterable(ranks.gather(results))
    return _collect([result for _, result in sorted(everyone, key=lambda entry: entry[0])])


# Tables of batches, where each of their crystals comes from, and the crystals left out.
_FAULTS = (ValueError, MemoryError, torch.OutOfMemoryError)
_Result = tuple[list[PredictionTable], list[str], list[Reject]]


def _own_results(
    model: MGT,
    datasets: Sequence[CrystalDataset],
    inputs: Inputs | None,
    batch_size: int,
    workers: int | None,
    ranks: Ranks,
    memory: float | None,
) -> Iterator[tuple[int, _Result]]:
    """Yield what this rank predicts, each piece with its number among all ranks' pieces."""
    number = 0
    for dataset in datasets:
        batches = _batches(dataset, batch_size)
        for own in range((ranks.rank - number) % ranks.size, len(batches), ranks.size):
            yield number + own, _predict_rows(model, dataset, batches[own : own + 1], memory)
        number += len(batches)
    if inputs is not None:
        first = number + (ranks.rank - number) % ranks.size
        files = _predict_files(model, inputs, batch_size, workers, first - number, ranks.size, memory)
        for own, result in enumerate(files):
            yield first + own * ranks.size, result


def _batches(dataset: CrystalDataset, batch_size: int) -> list[np.ndarray]:
    starts = range(0, len(dataset), batch_size)
    return [np.arange(start, min(start + batch_size, len(dataset))) for start in starts]


def _predict_rows(
    model: MGT,
    dataset: CrystalDataset,
    batches: Sequence[np.ndarray],
    memory: float | None,
    sources: Sequence[str] | None = None,
) -> _Result:
    """Predict batches of a dataset's crystals, which come from `sources`; None: from the dataset."""

    def source(index: int) -> str:
        return f"{dataset.path}: {dataset.ids[index]}" if sources is None else sources[index]

    tables, kept, rejects = [], [], []
    for indices in batches:
        try:
            tables.append(predict_crystals(model, [dataset.gather(indices)], memory))
            kept += indices.tolist()
        except _FAULTS:  # some crystal of this batch: find out which
            for index in indices:
                try:
                    tables.append(predict_crystals(model, [dataset.gather([index])], memory))
                    kept.append(index)
                except _FAULTS as error:
                    name = dataset.ids[index]
                    reason = "no_prediction" if type(error) is ValueError else "too_large"
                    rejects.append(Reject(source(index), name, reason, name, str(error)))
    return tables, [source(index) for index in kept], rejects


def _predict_files(
    model: MGT,
    inputs: Inputs,
    batch_size: int,
    workers: int | None,
    first: int,
    step: int,
    memory: float | None,
) -> Iterator[_Result]:
    """Predict every `step`-th group of some hundred records, while others are being read."""
    groups = itertools.islice(chunks(inputs.records(), max(batch_size, CHUNK_SIZE)), first, None, step)
    options = ParseOptions(targets={}, require_target="none")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    for chunk, parsed in parse_all(groups, options, workers):
        unread = [
            Reject(
                chunk[i].source, chunk[i].id, fault.reason, str(fault.value)[:LONGEST_VALUE], fault.message
            )
            for i, fault in parsed.rejected
        ]
        crystals = CrystalDataset(Path(), [parsed.batch], {})
        tables, sources, rejects = _predict_rows(
            model, crystals, _batches(crystals, batch_size), memory, [chunk[i].source for i in parsed.kept]
        )
        yield tables, sources, unread + rejects


def _collect(results: Sequence[_Result]) -> tuple[PredictionTable | None, list[Reject]]:
    """Join results; crystals whose name is not unique are called by where they come from."""
    tables = [table for some, _, _ in results for table in some]
    rejects = [reject for _, _, some in results for reject in some]
    if not tables:
        return None, rejects
    table = PredictionTable.concatenate(tables)
    sources = [source for _, some, _ in results for source in some]
    count = Counter(table.ids)
    ids = (name if count[name] == 1 else source for name, source in zip(table.ids, sources, strict=True))
    return replace(table, ids=tuple(ids)), rejects
