"""Keep what runs measured: `python bench/record.py bench/last.json ...` writes `results/<device>.json`.

Benchmarks that the file already holds are kept; those measured again are replaced, and those that a run could
not measure are listed with the reason.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def record(source: Path, folder: Path = RESULTS) -> Path:
    """Merge one pytest-benchmark JSON file into the device's record and return its path."""
    run = json.loads(source.read_text())
    machine = run["machine_info"]
    if machine["smoke"]:
        raise SystemExit(f"{source} is a smoke test at tiny sizes; run without --smoke to record")
    path = folder / (re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + ".json")
    entries = json.loads(path.read_text()) if path.exists() else {}
    origin = {
        "device": machine["device"],
        "versions": machine["versions"],
        "date": run["datetime"][:10],
        "commit": run["commit_info"]["id"][:12] + ("+" if run["commit_info"]["dirty"] else ""),
    }
    if machine["ceilings"]:
        entries["ceilings"] = machine["ceilings"] | origin
    for bench in run["benchmarks"]:
        stats = bench["stats"]
        entries[bench["fullname"].rpartition("/")[2]] = {
            "group": bench["group"],
            "median_s": stats["median"],
            "iqr_s": stats["iqr"],
            "rounds": stats["rounds"],
            **bench["extra_info"],
            **origin,
        }
    for failure in run["unmeasured"]:
        entries[failure["name"]] = {"unmeasured": failure["reason"], **origin}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1) + "\n")
    return path


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(record(Path(name)))
