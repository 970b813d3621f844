"""Keep what a run measured: `python bench/record.py bench/last.json` writes `results/<device>.json`.

Runs of other suites that the file already holds are kept; those measured again are replaced.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def record(source: Path) -> Path:
    """Merge one pytest-benchmark JSON file into the device's record and return its path."""
    run = json.loads(source.read_text())
    machine = run["machine_info"]
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + ".json")
    entries = json.loads(path.read_text()) if path.exists() else {}
    for bench in run["benchmarks"]:
        stats = bench["stats"]
        entries[bench["fullname"].rpartition("/")[2]] = {
            "group": bench["group"],
            "median_s": stats["median"],
            "iqr_s": stats["iqr"],
            "rounds": stats["rounds"],
            **bench["extra_info"],
            "device": machine["device"],
            "python": machine["python_version"],
            "torch": machine["torch"],
            "date": run["datetime"][:10],
            "commit": run["commit_info"]["id"][:12] + ("+" if run["commit_info"]["dirty"] else ""),
        }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(record(Path(name)))
