"""The part of the ingest that runs in worker processes: raw records to checked crystals.

A structure is refused for one of these reasons: `unreadable_cif`, `unreadable_record`, `unreadable_file`,
`not_finite`, `unknown_element`, `partial_occupancy`, `near_zero_volume`, `bad_cell` (its volume overflows, or
it is skewed beyond measure), `bad_coordinates` (a million cells away), `atoms_too_close`; a target for
`not_finite`, `target_not_a_number`, `missing_target`; a part for `unknown_split`; and a record that asks too
much for `too_large` (its text), `too_many_atoms`, `timeout`, `out_of_memory`, or, when the parser itself died
of it, `parser_failure`.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from ..graph import neighbor_list
from ..structures import CrystalBatch
from .readers.base import Crystal, RawRecord, RecordError, target_value
from .store import record_batch
from .workers import Limits, LostError, WorkerPool

REQUIREMENTS = ("any", "all", "none")
MIN_DISTANCE = 0.5  # Å
MANY_ATOMS = 1000  # of which a crowd would have very many pairs
# How the neighbour list says that atoms, or an atom and its image, all but coincide.
_DISTANCE = re.compile(r"(?:are|is) (\S+) Å (?:apart|from its own image)")


@dataclass(frozen=True)
class ParseOptions:
    """What `prepare` asks of the workers.

    Attributes:
        targets: key in the records to name in the dataset.
        require_target: "any" (a record needs one of them), "all" or "none".
        limits: what one record may take; in worker processes alone.
    """

    targets: Mapping[str, str]
    require_target: str = "any"
    limits: Limits = field(default_factory=Limits)


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


def parse_chunk(
    records: Sequence[RawRecord], options: ParseOptions, watch: Callable[[int], None] = lambda position: None
) -> Parsed:
    """Parse and check records; whatever one of them does wrong, the others are unharmed.

    Args:
        records: the records.
        options: what is asked.
        watch: called with the position of each record when its turn comes, then with their number.

    Raises:
        LostError: if memory runs out over the records together.
    """
    good: list[tuple[int, Crystal, dict[str, float]]] = []
    rejected = []
    for i, record in enumerate(records):
        watch(i)
        try:
            crystal = record.payload.crystal()
            _check_crowd(crystal)
            good.append((i, crystal, _targets(record.targets, options)))
        except RecordError as error:
            rejected.append((i, error))
        except Exception as error:
            reason = "out_of_memory" if isinstance(error, MemoryError) else "unreadable_record"
            message = f"{type(error).__name__}: {error}"
            rejected.append((i, RecordError(reason, type(record.payload).__name__, message)))
    watch(len(records))
    try:
        return _checked(records, good, rejected, options)
    except MemoryError as error:
        message = "not enough memory to check and store it"
        raise LostError(len(records), "out_of_memory", message) from error


def _checked(
    records: Sequence[RawRecord],
    good: Sequence[tuple[int, Crystal, dict[str, float]]],
    rejected: list[tuple[int, RecordError]],
    options: ParseOptions,
) -> Parsed:
    """Reject crystals with crowded atoms, and pack the others."""
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


def _check_crowd(crystal: Crystal) -> None:
    """Refuse two of many atoms in one cube of 0.25 Å, before a list of all close pairs is made."""
    if len(crystal.numbers) <= MANY_ATOMS:
        return
    wrapped = crystal.frac_coords - np.where(crystal.pbc, np.floor(crystal.frac_coords), 0.0)
    positions = wrapped @ crystal.cell
    cubes = np.floor(positions / (MIN_DISTANCE / 2))
    order = np.lexsort(cubes.T)
    same = np.flatnonzero((np.diff(cubes[order], axis=0) == 0).all(axis=1))
    if len(same):
        i, j = sorted(order[same[0] : same[0] + 2].tolist())
        raise _too_close(float(np.linalg.norm(positions[i] - positions[j])), i, j)


def _too_close(distance: float, i: int, j: int) -> RecordError:
    message = f"atoms {i} and {j} are {distance:.6g} Å apart, less than {MIN_DISTANCE} Å"
    return RecordError("atoms_too_close", f"{distance:.6g}", message)


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
    return {b: _too_close(*pair) for b, pair in closest.items()}


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

    A record that kills its worker, or takes more time or memory than `options.limits`, is rejected and the
    rest goes on. With `workers` = 0 everything happens in this process, without that protection.
    """
    if workers == 0:
        for chunk in chunks:
            yield chunk, _parse_surviving(lambda records: parse_chunk(records, options), chunk)
        return
    with WorkerPool(workers, parse_chunk, options, options.limits) as pool:
        yield from pool.map(_parse_surviving, chunks)


def _parse_surviving(parse: Callable[[Sequence[RawRecord]], Parsed], records: Sequence[RawRecord]) -> Parsed:
    """Parse records, and without the one that makes `parse` fail should it fail."""
    kept, batches, rejected = [], [], []
    groups = deque([list(range(len(records)))])
    while groups:
        group = groups.popleft()
        try:
            parsed = parse([records[i] for i in group])
        except LostError as lost:
            if lost.position == len(group) > 1:  # what is done with all at once: find out which one it is
                groups.extendleft([i] for i in reversed(group))
                continue
            culprit = group.pop(min(lost.position, len(group) - 1))
            kind = type(records[culprit].payload).__name__
            rejected.append((culprit, RecordError(lost.reason, kind, lost.message)))
            groups.appendleft(group)
            continue
        kept += [group[j] for j in parsed.kept]
        rejected += [(group[j], error) for j, error in parsed.rejected]
        batches.append(parsed.batch)
    return Parsed(kept, pa.concat_batches(batches), sorted(rejected, key=lambda entry: entry[0]))
