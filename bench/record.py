"""Keep what a run measured: `python bench/record.py bench/last.json`.

`results/<device>.json` holds the latest figures of every benchmark: those measured again are replaced, and
those that a run could not measure are listed with the reason. `results/history/<device>/<date>-<commit>.json`
holds what each commit reached, for `history.py`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
HISTORY_FIELDS = ("group", "median_s", "iqr_s", "against", "ratio", "ratio_iqr", "goals")


def device_slug(device: str) -> str:
    """Name of a device's files."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def origin(run: dict, commit: str = "") -> dict:
    """Where a run's figures come from."""
    machine = run["machine_info"]
    return {
        "device": machine["device"],
        "versions": machine["versions"],
        "date": run["datetime"][:10],
        "commit": commit or run["commit_info"]["id"][:12] + "+" * run["commit_info"]["dirty"],
        **({"smoke": True} if machine["smoke"] else {}),
    }


def entries(run: dict, commit: str = "") -> dict[str, dict]:
    """Return what a pytest-benchmark file measured, by name.

    A fast path that names its rival ("against") has a "ratio", how many times faster it is: timed in turns
    with it, or else of the medians of this run. It has none if the rival was not measured.

    Args:
        run: the file's content.
        commit: of the code that ran, for a machine without the repository's history.
    """
    source = origin(run, commit)
    found = {
        bench["fullname"].rpartition("/")[2]: {
            "group": bench["group"],
            "median_s": bench["stats"]["median"],
            "iqr_s": bench["stats"]["iqr"],
            "rounds": bench["stats"]["rounds"],
            **bench["extra_info"],
            **source,
        }
        for bench in run["benchmarks"]
    }
    for entry in found.values():
        rival = found.get(entry.get("against"))
        if rival and "ratio" not in entry:
            entry["ratio"] = rival["median_s"] / entry["median_s"]
    for failure in run["unmeasured"]:
        fast = {"fast": True} if failure.get("fast") else {}
        found[failure["name"]] = {"unmeasured": failure["reason"], **fast, **source}
    return found


def record(source: Path, folder: Path = RESULTS, commit: str = "") -> Path:
    """Merge one pytest-benchmark JSON file into the device's record and history; return the record's path.

    Args:
        source: what `--benchmark-json` wrote.
        folder: where the records are.
        commit: see `entries`.

    Raises:
        ValueError: if a smoke test would join the project's results.
    """
    run = json.loads(source.read_text())
    machine = run["machine_info"]
    if machine["smoke"] and folder == RESULTS:
        raise ValueError(f"{source} holds tiny sizes; run without --smoke to record")
    path = folder / f"{device_slug(machine['device'])}.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    new = entries(run, commit)
    recorded |= new
    if machine["ceilings"]:
        recorded["ceilings"] = machine["ceilings"] | origin(run, commit)
    write(path, dict(sorted(recorded.items())))
    keep_history(new, run["datetime"], folder)
    return path


def keep_history(new: dict[str, dict], when: str, folder: Path = RESULTS) -> None:
    """Merge figures of one run into the history of their device and commit.

    Args:
        new: see `entries`.
        when: ISO date and time of the run.
        folder: where the records are.
    """
    measured = {name: entry for name, entry in new.items() if "median_s" in entry}
    if not measured:
        return
    first = next(iter(measured.values()))
    name = f"{when[:10]}-{first['commit'].replace('+', '-changed')}.json"
    path = folder / "history" / device_slug(first["device"]) / name
    kept = json.loads(path.read_text()) if path.exists() else {"benchmarks": {}}
    kept |= {"device": first["device"], "date": when[:16], "commit": first["commit"]}
    kept["versions"] = first["versions"]
    for bench, entry in measured.items():
        kept["benchmarks"][bench] = {field: entry[field] for field in HISTORY_FIELDS if field in entry}
    kept["benchmarks"] = dict(sorted(kept["benchmarks"].items()))
    write(path, kept)


def forget(path: Path, names: list[str]) -> None:
    """Take benchmarks that were removed from the code out of a record; the history keeps them.

    Raises:
        ValueError: if the record does not hold one of them.
    """
    recorded = json.loads(path.read_text())
    unknown = sorted(set(names) - set(recorded))
    if unknown:
        raise ValueError(f"{path} does not hold {unknown[0]}")
    write(path, {name: entry for name, entry in recorded.items() if name not in names})


def write(path: Path, content: dict) -> None:
    """Write JSON that shows its differences line by line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs", nargs="+", type=Path, help="files of --benchmark-json; with --forget a record"
    )
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--commit", default="", help="of the code that ran, where there is no git history")
    parser.add_argument("--forget", nargs="+", metavar="NAME", help="take removed benchmarks out of a record")
    arguments = parser.parse_args()
    for run in arguments.runs:
        if arguments.forget:
            forget(run, arguments.forget)
        else:
            print(record(run, arguments.folder, arguments.commit))


if __name__ == "__main__":
    main()
