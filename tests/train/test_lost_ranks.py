"""A rank that is killed ends the whole job, with the reason and soon; the run continues bit for bit.

Under torchrun itself, as users start it.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import killed_rank
import pytest
from faults import count
from ranks import run_ranks
from small_runs import COMMANDS, arguments, remains, run

POINTS = count(1, 10)
LIMIT = 30.0  # seconds from the death of a rank to the end of the job
# Places that a rank passes, and how often; and those that only the first does.
EVERYWHERE = {
    "start": 4,
    "graphs": 12,
    "forward": 12,
    "backward": 12,
    "gradients": 12,
    "update": 12,
    "validation": 4,
    "epoch's end": 4,
    "state": 8,
}
FIRST = {"folder (disk)": 10, "best and last (disk)": 16, "state (disk)": 60, "log (disk)": 2}


def quickly(rank, command, folder, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        run(command, folder, **options)


def fates(size):
    """Yield commands, ranks to die and their last moments, at random."""
    chance = random.Random(size)
    while True:
        rank = chance.randrange(size)
        places = EVERYWHERE | FIRST if rank == 0 else EVERYWHERE
        place = chance.choice(list(places))
        moment = {"at": chance.randrange(places[place]), "only": place, "torn": chance.random() < 0.5}
        moment["delay"] = chance.choice((None, chance.uniform(0, 0.05)))
        yield chance.choice(COMMANDS), rank, moment


def torchrun(size, command, folder, plan, name):
    """Start a run under torchrun; return its exit status, what it wrote to stderr, and when it had ended."""
    job = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "--standalone"]
    process = subprocess.Popen(
        [*job, killed_rank.__file__, json.dumps(plan), *arguments(command, folder), "--resume"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "JOB": name},
    )
    try:
        _, said = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        for pid in processes_of(name):
            os.kill(pid, 9)
        raise
    return process.returncode, said, time.time()


def processes_of(name):
    """Return the processes that were started for a job."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"JOB={name}".encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:
            continue  # it ended, or is another user's
    return found


@pytest.mark.parametrize("size", [2, 4] if POINTS > 1 else [2])
def test_a_killed_rank_ends_the_job_and_the_run_continues(size, tmp_path, monkeypatch, record_property):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    whole = {}
    for i, (command, rank, moment) in zip(range(POINTS), fates(size), strict=False):
        folder, stamp, name = tmp_path / str(i), tmp_path / f"{i}.time", f"{tmp_path}/{i}"
        plan = {"rank": rank, "moment": moment, "file": str(stamp)}
        status, said, ended = torchrun(size, command, folder, plan, name)
        seconds = ended - float(stamp.read_text())
        record_property("seconds", seconds)
        assert status == 1, plan
        assert seconds < LIMIT, plan
        assert "(SIGKILL)" in said, said
        assert processes_of(name) == []
        if command not in whole:
            (meeting := tmp_path / f"meet-{command}").mkdir()
            run_ranks(quickly, size, meeting, command, tmp_path / command, {})
            whole[command] = remains(tmp_path / command)
        (meeting := tmp_path / f"meet-{i}").mkdir()
        run_ranks(quickly, size, meeting, command, folder, {"resume": True})
        assert remains(folder) == whole[command], plan
