"""The part of the ingest that runs in worker processes: raw records to checked crystals.

A structure is refused for one of these reasons: `unreadable_cif`, `unreadable_record`, `unreadable_file`,
`not_finite`, `unknown_element`, `partial_occupancy`, `near_zero_volume`, `bad_cell` (its volume overflows, or
it is skewed beyond measure), `bad_coordinates` (a million cells away), `atoms_too_close`; a target for
`not_finite`, `target_not_a_number`, `missing_target`; a part for `unknown_split`; and a record on which the
parser itself died for `parser_failure`.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import torch

from ..graph import neighbor_list
from ..structures import CrystalBatch
from .readers.base import Crystal, RawRecord, RecordError, target_value
from .store import record_batch

REQUIREMENTS = ("any", "all", "none")
MIN_DISTANCE = 0.5  # Å
# How the neighbour list says that atoms, or an atom and its image, all but coincide.
_DISTANCE = re.compile(r"(?:are|is) (\S+) Å (?:apart|from its own image)")


@dataclass(frozen=True)
class ParseOptions:
    """What `prepare` asks of the workers.

    Attributes:
        targets: key in the records to name in the dataset.
        require_target: "any" (a record needs one of them), "all" or "none".
        timeout: seconds after which a worker counts as hung; a chunk takes well under one.
    """

    targets: Mapping[str, str]
    require_target: str = "any"
    timeout: float = 60.0


@dataclass
class Parsed:
    """A chunk of records after parsing.

    Attributes:
        kept: positions in the chunk of the records that can be stored.
        batch: these, as the dataset stores them.
        rejected: position in the chunk and error of all others.
    """

    kept: list[int]
    batch: pa.RecordBatch
    rejected: list[tuple[int, RecordError]] = field(default_factory=list)


def parse_chunk(records: Sequence[RawRecord], options: ParseOptions) -> Parsed:
    """Parse and check records; whatever one of them does wrong, the others are unharmed."""
    good: list[tuple[int, Crystal, dict[str, float]]] = []
    rejected = []
    for i, record in enumerate(records):
        try:
            crystal = record.payload.crystal()
            good.append((i, crystal, _targets(record.targets, options)))
        except RecordError as error:
            rejected.append((i, error))
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            rejected.append((i, RecordError("unreadable_record", type(record.payload).__name__, message)))
    crowded = _crowded([crystal for _, crystal, _ in good], [records[i].id for i, _, _ in good])
    rejected += [(good[j][0], error) for j, error in crowded.items()]
    good = [entry for j, entry in enumerate(good) if j not in crowded]
    kept = [i for i, _, _ in good]
    batch = record_batch(
        ids=[records[i].id for i in kept],
        numbers=[crystal.numbers for _, crystal, _ in good],
        frac_coords=[crystal.frac_coords for _, crystal, _ in good],
        cell=np.array([crystal.cell for _, crystal, _ in good]),
        pbc=np.array([crystal.pbc for _, crystal, _ in good], dtype=bool),
        split=[records[i].split for i in kept],
        targets={name: [values[name] for _, _, values in good] for name in options.targets.values()},
    )
    return Parsed(kept, batch, sorted(rejected, key=lambda entry: entry[0]))


def _targets(raw: Mapping[str, object], options: ParseOptions) -> dict[str, float]:
    values = {}
    for key, name in options.targets.items():
        value = target_value(raw.get(key))
        if value is None:
            raise RecordError("target_not_a_number", raw[key], f"{key} is {raw[key]!r:.100}, not a number")
        if math.isinf(value):
            raise RecordError("not_finite", raw[key], f"{key} is {raw[key]}")
        values[name] = value
    missing = [key for key, name in options.targets.items() if math.isnan(values[name])]
    tolerated = {"any": len(values) - 1, "all": 0, "none": len(values)}[options.require_target]
    if values and len(missing) > tolerated:
        raise RecordError("missing_target", raw.get(missing[0]), f"no value for {', '.join(missing)}")
    return values


def _crowded(crystals: Sequence[Crystal], ids: Sequence[str]) -> dict[int, RecordError]:
    """Return the crystals with atoms, images among them, closer than 0.5 Å, or with an impossible cell."""
    if not crystals:
        return {}
    try:
        closest = _closest_pairs(crystals, ids)
    except ValueError as error:  # the neighbour list refuses atoms that all but coincide, and some cells
        if len(crystals) == 1:
            distance = _DISTANCE.search(str(error))
            if distance:
                return {0: RecordError("atoms_too_close", distance[1], str(error))}
            return {0: RecordError("bad_cell", crystals[0].cell.tolist(), str(error))}
        one_by_one = enumerate(zip(crystals, ids, strict=True))
        return {i: e for i, (crystal, name) in one_by_one for e in _crowded([crystal], [name]).values()}
    return {
        b: RecordError(
            "atoms_too_close",
            f"{distance:.6g}",
            f"atoms {i} and {j} are {distance:.6g} Å apart, less than {MIN_DISTANCE} Å",
        )
        for b, (distance, i, j) in closest.items()
    }


def _closest_pairs(crystals: Sequence[Crystal], ids: Sequence[str]) -> dict[int, tuple[float, int, int]]:
    """Return crystal -> (distance, atom, atom) of the closest pair below MIN_DISTANCE."""
    batch = CrystalBatch.from_arrays(
        np.concatenate([crystal.numbers for crystal in crystals]),
        np.concatenate([crystal.frac_coords for crystal in crystals]),
        np.array([crystal.cell for crystal in crystals]),
        [len(crystal.numbers) for crystal in crystals],
        np.array([crystal.pbc for crystal in crystals]),
        ids,
    )
    pairs = neighbor_list(batch, cutoff=MIN_DISTANCE, half=True, threads=1)
    distance = pairs.edge_vec.norm(dim=1)
    closest = {}
    for e in distance.argsort(descending=True).tolist():
        i, j = pairs.edge_index[:, e].tolist()
        b = int(torch.searchsorted(batch.batch_ptr, i, right=True)) - 1
        first = int(batch.batch_ptr[b])
        closest[b] = (float(distance[e]), i - first, j - first)
    return closest


def parse_all(
    chunks: Iterable[Sequence[RawRecord]], options: ParseOptions, workers: int
) -> Iterator[tuple[Sequence[RawRecord], Parsed]]:
    """Parse chunks in worker processes and yield them in order.

    A record that kills its worker, or keeps it busy for `options.timeout`, is rejected and the rest goes on.
    With `workers` = 1 everything happens in this process, without that protection.
    """
    if workers == 1:
        for chunk in chunks:
            yield chunk, parse_chunk(chunk, options)
        return
    pool = _Pool(workers)
    pending: deque[tuple[Sequence[RawRecord], Future]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(chunk, options)))
            if len(pending) >= 4 * workers:
                yield _settle(*pending.popleft(), options)
        while pending:
            yield _settle(*pending.popleft(), options)
    finally:
        pool.close()


def _settle(chunk: Sequence[RawRecord], future: Future, options: ParseOptions):
    try:
        return chunk, future.result()
    except BrokenProcessPool:
        return chunk, _parse_one_by_one(chunk, options)


def _parse_one_by_one(chunk: Sequence[RawRecord], options: ParseOptions) -> Parsed:
    """Parse a chunk during which a worker died, to find the record that killed it."""
    pool = _Pool(1)
    kept, batches, rejected = [], [], []
    for i, record in enumerate(chunk):
        try:
            parsed = pool.submit([record], options).result()
        except BrokenProcessPool:
            message = f"the parser crashed or took longer than {options.timeout:g} s"
            rejected.append((i, RecordError("parser_failure", type(record.payload).__name__, message)))
            continue
        kept += [i] * len(parsed.kept)
        rejected += [(i, error) for _, error in parsed.rejected]
        batches.append(parsed.batch)
    pool.close()
    empty = parse_chunk([], options).batch
    return Parsed(kept, pa.concat_batches([empty, *batches]), rejected)


class _Pool:
    """A process pool that replaces itself when a worker has died."""

    def __init__(self, workers: int):
        self.workers = workers
        self.context = get_context("forkserver")  # threads of this process (torch) forbid a plain fork
        self.context.set_forkserver_preload([__name__])
        self._start()

    def _start(self) -> None:
        self.executor = ProcessPoolExecutor(self.workers, self.context)

    def submit(self, chunk: Sequence[RawRecord], options: ParseOptions) -> Future:
        try:
            return self.executor.submit(_parse_watched, chunk, options)
        except BrokenProcessPool:
            self.close()
            self._start()
            return self.executor.submit(_parse_watched, chunk, options)

    def close(self) -> None:
        self.executor.shutdown(cancel_futures=True)


def _parse_watched(chunk: Sequence[RawRecord], options: ParseOptions) -> Parsed:
    """Parse a chunk in a worker; should it hang, even inside a C library, the worker ends itself."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(options.timeout, exit=True, file=nowhere)
        try:
            return parse_chunk(chunk, options)
        finally:
            faulthandler.cancel_dump_traceback_later()
