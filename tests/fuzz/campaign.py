"""Feed hostile inputs to `prepare` and `predict`, one at a time, and see that each is stored or rejected.

python tests/fuzz/campaign.py 20000          all of a run
python tests/fuzz/campaign.py 20000 --only 17   one input, in this process, to look at it
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from hostile_files import hostile_file
from hostile_texts import cifs

from mgt_fast import MGT, MGTConfig
from mgt_fast.data import CrystalDataset, prepare
from mgt_fast.data.ingest import REJECTS
from mgt_fast.data.workers import Limits, LostError, WorkerPool
from mgt_fast.inference import predict_paths

LIMITS = Limits(seconds=5.0, stall=120.0, memory=2**30)
CHUNK = 50  # inputs handed to a process at once


@dataclass
class Outcome:
    """What became of an input.

    Attributes:
        kind: name of the file.
        read, stored: records.
        reasons: codes of the rejected ones, those of `predict` begin with "predict ".
        seconds: of processor time.
        memory: bytes by which the process grew at most.
        fault, traceback: what went wrong, "" if all is well.
    """

    kind: str
    read: int = 0
    stored: int = 0
    reasons: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    memory: int = 0
    fault: str = ""
    traceback: str = ""


@cache
def network() -> MGT:
    """Return a small network for prediction."""
    torch.manual_seed(0)
    return MGT(MGTConfig(channels=8, num_scalars=4, num_vectors=2, num_blocks=1, expert_hidden=4)).eval()


def examine(seed: int) -> Outcome:
    """Prepare a folder of a hostile file and a sound one, predict it, and check the accounts."""
    name, content = hostile_file(seed)
    outcome = Outcome(name)
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder, output = Path(temporary) / "in", Path(temporary) / "dataset"
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "sound.cif").write_text(cifs()[1])
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.process_time()
        try:
            _prepared(folder, output, outcome)
            _predicted(folder, outcome)
        except Exception as error:
            outcome.fault = f"{type(error).__name__}: {error}"[:500]
            outcome.traceback = traceback.format_exc()
        outcome.seconds = time.process_time() - started
        outcome.memory = _memory("VmHWM") - before
    return outcome


def _prepared(folder: Path, output: Path, outcome: Outcome) -> None:
    summary = prepare(folder, output, workers=0)
    outcome.read, outcome.stored, outcome.reasons = summary.read, summary.stored, Counter(summary.by_reason)
    with (output / REJECTS).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert summary.read == summary.stored + summary.rejected
    assert summary.rejected == len(rows)
    assert all(row["source"] and row["reason"] and row["message"] for row in rows)
    dataset = CrystalDataset.open(output)
    assert len(dataset) == len(set(dataset.ids)) == summary.stored
    assert "sound" in dataset.ids or any(row["id"] == "sound" for row in rows)
    assert summary.read > 1 or "left out" in " ".join(summary.notes)


def _predicted(folder: Path, outcome: Outcome) -> None:
    table, rejects = predict_paths(network(), [folder], workers=0, memory=LIMITS.memory)
    assert len(table) + len(rejects) >= outcome.read
    assert torch.from_numpy(table.prediction).isfinite().all()
    assert all(reject.source and reject.reason and reject.message for reject in rejects)
    late = [reject for reject in rejects if reject.reason in ("no_prediction", "too_large")]
    outcome.reasons.update(f"predict {reject.reason}" for reject in late)


def _memory(which: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def examine_all(seeds, common, watch) -> list[Outcome]:
    """Examine some inputs, in a worker."""
    torch.set_num_threads(1)
    network(), cifs()
    outcomes = []
    for position, seed in enumerate(seeds):
        watch(position)
        outcomes.append(examine(seed))
    watch(len(seeds))
    return outcomes


def _surviving(call, seeds) -> list[Outcome]:
    """Examine inputs; the one that ends the process is a fault of its own."""
    try:
        return call(seeds)
    except LostError as lost:
        p = lost.position
        fault = Outcome(hostile_file(seeds[p])[0], fault=f"{lost.reason}: {lost.message}")
        return [*_surviving(call, seeds[:p]), fault, *_surviving(call, seeds[p + 1 :])]


def campaign(seeds):
    """Yield (seed, outcome) of every input."""
    seeds = list(seeds)
    with WorkerPool(1, examine_all, None, LIMITS) as pool:
        for chunk, outcomes in pool.map(
            _surviving, [seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)]
        ):
            yield from zip(chunk, outcomes, strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--keep", type=Path, help="write the inputs at fault to this folder")
    arguments = parser.parse_args()
    if arguments.only is not None:
        outcome = examine(arguments.only)
        sys.stdout.write(f"{outcome}\n{outcome.traceback}")
        return 0
    total, faults, slowest, largest = Counter(), 0, (0.0, 0), (0, 0)
    reasons, kinds = Counter(), Counter()
    for seed, outcome in campaign(range(arguments.first, arguments.first + arguments.count)):
        total.update(inputs=1, read=outcome.read, stored=outcome.stored)
        reasons.update(outcome.reasons)
        kinds[outcome.kind] += 1
        slowest, largest = max(slowest, (outcome.seconds, seed)), max(largest, (outcome.memory, seed))
        too_much = outcome.seconds > LIMITS.seconds or outcome.memory > LIMITS.memory
        if outcome.fault or too_much:
            faults += 1
            what = outcome.fault or f"{outcome.seconds:.1f} s, {outcome.memory / 2**20:.0f} MiB"
            sys.stdout.write(f"{seed} {outcome.kind}: {what}\n")
            sys.stdout.flush()
            if arguments.keep:
                name, content = hostile_file(seed)
                arguments.keep.mkdir(exist_ok=True)
                (arguments.keep / f"{seed}-{name}").write_bytes(content)
    report = {
        "faults": faults,
        **total,
        "kinds": kinds,
        "rejected": dict(reasons.most_common()),
        "slowest": {"seconds": round(slowest[0], 2), "seed": slowest[1]},
        "largest": {"MiB": largest[0] >> 20, "seed": largest[1]},
    }
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
