"""Keep what a run measured: `python bench/record.py bench/last.json` writes `results/<device>.json`.

Benchmarks that the file already holds are kept; those measured again are replaced, and those that a run could
not measure are listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("results")


def record(source: Path, folder: Path = RESULTS, commit: str = "") -> Path:
    """Merge one pytest-benchmark JSON file into the device's record and return its path.

    Args:
        source: what `--benchmark-json` wrote.
        folder: where the records are.
        commit: of the code that ran, for a machine without the repository's history.

    Raises:
        ValueError: if a smoke test would join the project's results.
    """
    run = json.loads(source.read_text())
    machine = run["machine_info"]
    if machine["smoke"] and folder == RESULTS:
        raise ValueError(f"{source} holds tiny sizes; run without --smoke to record")
    path = folder / (re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-") + ".json")
    entries = json.loads(path.read_text()) if path.exists() else {}
    origin = {
        "device": machine["device"],
        "versions": machine["versions"],
        "date": run["datetime"][:10],
        "commit": commit or run["commit_info"]["id"][:12] + "+" * run["commit_info"]["dirty"],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    for run in arguments.runs:
        print(record(run, arguments.folder, arguments.commit))


if __name__ == "__main__":
    main()
