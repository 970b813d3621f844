"""The ingest: crystals in any of the formats of `readers` become a dataset."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..graph import SHELL_TOLERANCE
from .counts import count_edges
from .parse import REQUIREMENTS, Parsed, ParseOptions, parse_all
from .readers.base import Faulty, PrepareError, RawRecord, RecordError, target_value
from .readers.inputs import Inputs, read_text
from .store import (
    DEFAULT_SHARD_SIZE,
    SPLITS,
    DatasetError,
    DatasetWriter,
    Target,
    check_output,
    dataset_schema,
)

REJECTS = "rejects.csv"
CHUNK_SIZE = 256  # records a worker takes at a time
CHUNK_TEXT = 2**22  # characters of text after which it gets no more
MAX_TARGETS = 1000  # that are chosen without being named
SAMPLE_SIZE = 1000  # records in which targets are looked for
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
SPLIT_COLUMN = "split"
LONGEST_EXAMPLE = 30  # characters of a value that a note shows
LONGEST_VALUE = 200  # characters of a value at fault that rejects.csv shows


@dataclass
class PrepareSummary:
    """What `prepare` did; `str` of it is the text for the user.

    Attributes:
        path: the dataset.
        read, stored, rejected: numbers of records; read = stored + rejected.
        by_reason: number of rejected records of each reason code.
        targets: number of known values of each target.
        splits: number of crystals in each part.
        notes: what the user should know besides.
        seconds: time taken.
    """

    path: Path
    read: int = 0
    stored: int = 0
    rejected: int = 0
    by_reason: Counter = field(default_factory=Counter)
    targets: Counter = field(default_factory=Counter)
    splits: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        speed = self.read / self.seconds if self.seconds else math.inf
        lines = [
            f"{self.path}: {self.stored} crystals stored of {self.read} read, {self.rejected} rejected "
            f"({self.seconds:.1f} s, {speed:.0f} records/s)"
        ]
        lines += [f"  rejected: {reason} {count}" for reason, count in self.by_reason.most_common()]
        if self.rejected:
            lines.append(f"  every rejected record is listed in {self.path / REJECTS}")
        lines += [f"  target {name}: {count} values" for name, count in self.targets.items()]
        if self.splits.keys() - {""}:
            lines += [f"  {part or 'in no part'}: {count}" for part, count in sorted(self.splits.items())]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines).encode(errors="backslashreplace").decode()  # names of files may be anything


def prepare(
    inputs: Sequence[str | os.PathLike] | str | os.PathLike,
    output: str | os.PathLike,
    *,
    targets: Sequence[str] | Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    require_target: str = "any",
    labels: str | os.PathLike | None = None,
    split_file: str | os.PathLike | None = None,
    rename: Callable[[str], str] | None = None,
    format: str | None = None,
    workers: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    max_neighbors: int | None = 25,
    overwrite: bool = False,
    console: Console | None = None,
) -> PrepareSummary:
    """Read crystals from files, folders and archives and write a dataset.

    Every record is stored, or listed in the dataset's `rejects.csv` with source, id, reason code, the value
    at fault and a message. The second of two crystals with the same id is rejected (`duplicate_id`). The
    dataset does not depend on the number of workers. A script that calls this must guard its main part with
    `if __name__ == "__main__":`, because worker processes import it.

    Args:
        inputs: what to read, prepared datasets among it; formats are recognised (see
            `mgt_fast.data.readers`).
        output: folder of the dataset; it appears when complete.
        targets: keys (columns) to store, or a mapping from keys to names in the dataset. When absent: every
            key whose values in the first 1,000 records are numbers for the most part; a record with another
            value there is rejected (`target_not_a_number`).
        units: unit of targets, by name in the dataset.
        require_target: reject a record that lacks "any" (it has not a single target), "all" (it lacks one of
            them), or "none".
        labels: an id_prop.csv with the targets of CIF and POSCAR files; one in or beside the input is found.
        split_file: part of each crystal: a JSON object {"train": ids, "val": ids, "test": ids} (lists, or
            objects with ids as keys; may be zipped) or a csv with the columns id and split. When absent, a
            column `split` of the records counts, if it holds train, val, test or nothing.
        rename: from the name of a crystal in the input to its id in the dataset; None: the same.
        format: format of all files, instead of detection.
        workers: worker processes; as many as there are cores when absent. In one, a record that crashes the
            parser or takes more than `data.workers.Limits` allows is rejected; 0 parses in this process,
            without that protection.
        shard_size: crystals a shard.
        max_neighbors: count the edges of the graphs with so many neighbours, and store the counts for runs
            that use them (see `counts`); None for no counts. A crystal without such a graph is stored all the
            same, and a note tells of it.
        overwrite: replace an existing dataset.
        console: where to show progress; nowhere when absent.

    Raises:
        PrepareError: for a named input that is missing, damaged as a whole or of an unknown format, and for
            wrong arguments. Nothing is written then. A file inside a folder or an archive that cannot be read
            is one rejected record instead (`unreadable_file`).
        DatasetError: if `output` exists and may not be overwritten.
    """
    started = time.perf_counter()
    output = Path(output)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 0:
        raise PrepareError(f"workers = {workers}; it must be 0 (for none) or more")
    if require_target not in REQUIREMENTS:
        raise PrepareError(f"require_target = {require_target!r}; choose one of {', '.join(REQUIREMENTS)}")
    if max_neighbors is not None and max_neighbors < 1:
        raise PrepareError(f"max_neighbors = {max_neighbors}; it must be at least 1, or None for no counts")
    check_output(output, overwrite)
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else inputs
    source = Inputs([Path(path) for path in paths], format=format, labels=Path(labels) if labels else None)
    parts = read_split(Path(split_file)) if split_file else {}

    records = source.records()
    sample = list(itertools.islice(records, SAMPLE_SIZE))
    by_column = not split_file and _has_split_column(sample)

    def with_part(record: RawRecord) -> RawRecord:
        record = record if rename is None else replace(record, id=rename(record.id))
        return _part_from_column(record) if by_column else replace(record, split=parts.get(record.id, ""))

    sample = [with_part(record) for record in sample]
    records = map(with_part, records)
    keys = _TargetKeys(sample, targets)
    described = {keys.names[key]: target for key, target in source.targets(keys.names).items()}
    wrong = set(units or {}) - set(keys.names.values())
    if wrong:
        raise PrepareError(f"a unit was given for {min(wrong)!r}, which is no target of the dataset")
    stream = itertools.chain(sample, keys.watch(records))

    summary = PrepareSummary(output, targets=Counter(dict.fromkeys(keys.names.values(), 0)))
    info = {name: described.get(name, Target()) for name in keys.names.values()}
    info |= {name: replace(info[name], unit=unit) for name, unit in (units or {}).items()}
    with (
        DatasetWriter(output, info, shard_size=shard_size, overwrite=overwrite) as writer,
        open(
            writer.folder / REJECTS, "w", newline="", encoding="utf-8", errors="backslashreplace"
        ) as rejects_file,
        _progress(console, summary) as show,
    ):
        ids: set[str] = set()
        rejects = csv.writer(rejects_file)
        rejects.writerow(["source", "id", "reason", "value", "message"])
        options = ParseOptions(keys.names, require_target)
        for chunk, parsed in parse_all(chunks(stream), options, workers):
            parsed = _without_duplicates(chunk, parsed, ids)
            _count(summary, chunk, parsed)
            writer.write(parsed.batch)
            for i, error in parsed.rejected:
                value = str(error.value)[:LONGEST_VALUE]
                rejects.writerow([chunk[i].source, chunk[i].id, error.reason, value, error.message])
            show()
        if max_neighbors is not None:
            summary.notes += _store_edge_counts(writer, max_neighbors, console)
    summary.notes += source.notes + keys.notes()
    if by_column:
        summary.notes.append(f"the column {SPLIT_COLUMN!r} told the part of each crystal")
    absent = len(parts.keys() - ids)
    if absent:
        summary.notes.append(f"{absent} of the {len(parts)} ids in {split_file} are not in the dataset")
    summary.seconds = time.perf_counter() - started
    return summary


class _TargetKeys:
    """Which keys of the records become targets, from a sample of the records or as the user says."""

    def __init__(self, sample: Sequence[RawRecord], wanted: Sequence[str] | Mapping[str, str] | None):
        kinds: dict[str, Counter] = {}
        self._dropped: dict[str, object] = {}  # an example of what a key holds instead of numbers
        for record in sample:
            for key, raw in record.targets.items():
                kind = _kind(raw)
                kinds.setdefault(key, Counter())[kind] += 1
                if kind == "other":
                    self._dropped.setdefault(key, raw)
        self._unfit: list[str] = []
        if wanted is None:
            numbers = [key for key, count in kinds.items() if count["number"] > count["other"]]
            chosen = [key for key in numbers if _is_column_name(key)][:MAX_TARGETS]
            self.names = {key: key for key in chosen}
            self._unfit = [key for key in numbers if key not in self.names]
        else:
            self.names = dict(wanted) if isinstance(wanted, Mapping) else {key: key for key in wanted}
            unknown = [key for key in self.names if key not in kinds]
            if unknown:
                raise PrepareError(
                    f"none of the first {len(sample)} records has {unknown[0]!r}; "
                    f"they have {', '.join(kinds) or 'no values besides the structure'}"
                )
            if len(set(self.names.values())) < len(self.names):
                raise PrepareError(f"two targets have the same name: {', '.join(self.names.values())}")
        # A key whose kind the sample has settled needs no more attention.
        self._settled = {key for key, count in kinds.items() if count.keys() != {"missing"}}
        self._choose = wanted is None
        unused = self._dropped.keys() - self.names.keys() if self._choose else ()
        self._dropped = {key: raw for key, raw in self._dropped.items() if key in unused}
        self._late: dict[str, str] = {}

    def watch(self, records: Iterator[RawRecord]) -> Iterator[RawRecord]:
        """Pass records on and remember keys that had no value in the sample."""
        for record in records:
            for key in record.targets.keys() - self._settled if self._choose else ():
                kind = _kind(record.targets[key])
                if kind == "number":
                    self._late.setdefault(key, record.source)
                elif kind == "other":
                    self._dropped.setdefault(key, record.targets[key])
            yield record

    def notes(self) -> list[str]:
        """Return what was left out: what holds no numbers, and what came too late."""
        examples = [
            f"{key} ({' '.join(str(raw).split()):.{LONGEST_EXAMPLE}})" for key, raw in self._dropped.items()
        ]
        not_numbers = [f"not numbers, left out: {', '.join(examples)}"] if examples else []
        if self._unfit:
            shown = ", ".join(f"{key!r:.{LONGEST_EXAMPLE}}" for key in self._unfit[:5])
            not_numbers.append(
                f"{len(self._unfit)} keys that hold numbers cannot be columns, are named like one of a "
                f"structure, or exceed {MAX_TARGETS}, and are left out: {shown}; name targets to store them"
            )
        return not_numbers + [
            f"{key!r} has its first value only in {where} and is left out; name the targets to store it"
            for key, where in sorted(self._late.items())
        ]


def _is_column_name(key: str) -> bool:
    """Say whether a column of the dataset may have this name."""
    try:
        dataset_schema([key.encode().decode()])
    except (DatasetError, UnicodeEncodeError):
        return False
    return True


def _has_split_column(sample: Sequence[RawRecord]) -> bool:
    """Say whether the records have a column `split` with nothing but train, val, test and gaps in it."""
    values = [record.targets[SPLIT_COLUMN] for record in sample if SPLIT_COLUMN in record.targets]
    return all(value is None or _is_part(value) for value in values) and any(values)


def _is_part(value: object) -> bool:
    return isinstance(value, str) and value in SPLITS


def _part_from_column(record: RawRecord) -> RawRecord:
    targets = dict(record.targets)
    part = targets.pop(SPLIT_COLUMN, None)
    part = "" if part is None else part
    if _is_part(part):
        return replace(record, split=part, targets=targets)
    fault = Faulty(part, f"{SPLIT_COLUMN} is {part!r:.100}, none of train, val and test", "unknown_split")
    return replace(record, payload=fault, targets=targets)


def _kind(raw: object) -> str:
    value = target_value(raw)
    return "other" if value is None else "missing" if math.isnan(value) else "number"


def chunks(records: Iterator[RawRecord], size: int = CHUNK_SIZE) -> Iterator[list[RawRecord]]:
    """Yield the records in lists of at most `size`, fewer where they are long texts."""
    chunk, length = [], 0
    for record in records:
        chunk.append(record)
        length += len(getattr(record.payload, "text", ""))
        if len(chunk) == size or length > CHUNK_TEXT:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _without_duplicates(chunk: Sequence[RawRecord], parsed: Parsed, ids: set[str]) -> Parsed:
    """Reject crystals whose id is stored already; add the others to `ids`."""
    is_new, rejected = [], list(parsed.rejected)
    for i in parsed.kept:
        name = chunk[i].id
        is_new.append(name not in ids)
        if name in ids:
            rejected.append(
                (i, RecordError("duplicate_id", name, "a crystal with this id is stored already"))
            )
        ids.add(name)
    kept = list(itertools.compress(parsed.kept, is_new))
    batch = parsed.batch.filter(pa.array(is_new, pa.bool_()))
    return Parsed(kept, batch, sorted(rejected, key=lambda entry: entry[0]))


def _count(summary: PrepareSummary, chunk: Sequence[RawRecord], parsed: Parsed) -> None:
    summary.read += len(chunk)
    summary.stored += len(parsed.kept)
    summary.rejected += len(parsed.rejected)
    summary.by_reason.update(error.reason for _, error in parsed.rejected)
    summary.splits.update(chunk[i].split for i in parsed.kept)
    for name in summary.targets:
        summary.targets[name] += len(parsed.kept) - parsed.batch.column(name).null_count


def _store_edge_counts(writer: DatasetWriter, max_neighbors: int, console: Console | None) -> list[str]:
    """Store how many edges the crystals written have; return a note on those without a graph."""
    crystals = writer.written()
    counts = count_edges(crystals, max_neighbors, console=console)
    writer.add_edge_counts(counts, max_neighbors, SHELL_TOLERANCE)
    missing = np.flatnonzero(counts == 0)
    if not len(missing):
        return []
    return [
        f"{len(missing)} crystals have no graph with {max_neighbors} neighbours an atom, the first "
        f"{crystals.ids[missing[0]]!r}; a run with so many refuses them, one with fewer may not"
    ]


def read_split(path: Path) -> dict[str, str]:
    """Return the part of each id that a split file names.

    Raises:
        PrepareError: if the file is missing or unreadable, or names a part other than train, val and test, or
            an id twice.
    """
    if not path.is_file():
        raise PrepareError(f"{path} does not exist")
    text = read_text(path)
    try:
        if text.lstrip().startswith("{"):
            pairs = [(str(name), part) for part, names in json.loads(text).items() for name in names]
        else:
            pairs = [(row["id"], row["split"]) for row in csv.DictReader(io.StringIO(text))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PrepareError(
            f'{path} is no split file: expected {{"train": ids, "val": ids, "test": ids}} or a csv with the '
            f"columns id and split ({type(error).__name__}: {error})"
        ) from error
    parts: dict[str, str] = {}
    for name, part in pairs:
        if part not in SPLITS:
            raise PrepareError(f"{path}: part {part!r} of {name!r} is none of train, val and test")
        if parts.setdefault(name, part) != part:
            raise PrepareError(f"{path}: {name!r} is both in {parts[name]} and in {part}")
    return parts


@contextmanager
def _progress(console: Console | None, summary: PrepareSummary) -> Iterator[Callable[[], None]]:
    """Show how far the run has come: a live line on a terminal, else a plain line now and then."""

    def text() -> str:
        return f"{summary.read} read, {summary.stored} stored, {summary.rejected} rejected"

    if console is None:
        yield lambda: None
    elif console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(text())
            yield lambda: progress.update(task, description=text())
    else:
        last = time.monotonic()

        def show() -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_INTERVAL:
                console.print(text())
                last = time.monotonic()

        yield show
