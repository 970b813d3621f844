import collections
import json
import subprocess
import sys
from pathlib import Path

import shard_faults
from faults import count

COUNT = count(100, 1000)


def test_every_fault_is_detected_before_a_crystal_is_used(tmp_path):
    """With hashes each is named, with a remedy; without, whatever opens does no harm to the process."""
    output = tmp_path / "outcomes.jsonl"
    with output.open("w") as file:
        process = subprocess.run(
            [sys.executable, Path(shard_faults.__file__), tmp_path, str(COUNT)],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60 + COUNT,
            check=False,
        )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert process.returncode == 0, f"at {lines[-1] if lines else 'the start'}: {process.stderr}"
    outcomes = [line for line in lines if "fault" in line]
    damaged = [outcome for outcome in outcomes if not outcome["harmless"]]
    assert len(damaged) == COUNT
    assert [outcome for outcome in outcomes if not outcome["right"]] == []
    assert max(outcome["seconds"] for outcome in outcomes) < 5
    assert outcomes[-1]["peak_mib"] - outcomes[0]["peak_mib"] < 256
    kinds = collections.Counter(outcome["fault"] for outcome in damaged)
    assert kinds.keys() == {fault.__name__ for fault in shard_faults.FAULTS}
    # The hashes are what detects much of it: without them these would have been used.
    unnoticed = sum(outcome["unverified"] == "opened" for outcome in damaged)
    assert COUNT / 20 < unnoticed < COUNT / 2
