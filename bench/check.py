"""Tell whether a fast path lost ground to its rival since it was recorded on this device.

    python bench/check.py                        measure every fast path beside its rival, and compare
    python bench/check.py run.json               compare what `pytest --benchmark-json` wrote, measured once
    python bench/check.py --files bench_data.py  these files of the suite alone

A fast path fails when its ratio to the rival timed in the same run is more than 10 % below the recorded one;
on the same GPU also when its time is more than 5 % above it. Elsewhere times are shown and not judged. What
fails is measured once more, alone, and that decides. Benchmarks that are recorded and not measured, for want
of a rival or because they are gone, are named and never pass.

Exit status: 0 every ratio holds; 1 a fast path failed; 2 there is nothing to compare; 3 something that is
recorded was not measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from machine import device
from record import RESULTS, device_slug, entries, origin
from rich.console import Console
from rich.markup import escape
from rich.table import Table

BENCH = Path(__file__).parent
RATIO_DROP = 0.10
GPU_SLOWDOWN = 0.05
WIDTH = 150  # of the table where the output is no terminal


class CannotCompareError(ValueError):
    """A run without a record that it could be held against."""


class Verdict(Enum):
    """What became of a fast path; the value is its word in the table."""

    HOLDS = "holds"
    NEW = "new"
    MISSING = "missing"
    SLOWER = "SLOWER"


STYLES = {Verdict.HOLDS: "", Verdict.NEW: "cyan", Verdict.MISSING: "yellow", Verdict.SLOWER: "red"}


@dataclass(frozen=True)
class Finding:
    """A fast path in the record and in the run.

    Attributes:
        name: of the benchmark.
        verdict: what became of it.
        recorded, measured: its entries (see `record.entries`); empty where there is none.
        note: the reason, where the verdict needs one.
    """

    name: str
    verdict: Verdict
    recorded: dict
    measured: dict
    note: str = ""


def is_gpu(entry: dict) -> bool:
    """Whether an entry's device is a GPU."""
    return "cuda" in entry["versions"]


def compare(recorded: dict[str, dict], measured: dict[str, dict]) -> list[Finding]:
    """Judge every fast path of the record and of the run.

    Raises:
        CannotCompareError: if they come from different devices, or one of them holds tiny sizes.
    """
    names = {name for found in (recorded, measured) for name, entry in found.items() if is_fast_path(entry)}
    if not any(entry.get("full") for entry in measured.values()):
        # The run left the long benchmarks out.
        names -= {name for name, entry in recorded.items() if entry.get("full") and name not in measured}
    if not names:
        raise CannotCompareError("neither the run nor the record holds a fast path with a rival")
    return [judge(name, recorded.get(name, {}), measured.get(name, {}), measured) for name in sorted(names)]


def is_fast_path(entry: dict) -> bool:
    """Whether an entry is that of a fast path, measured or not."""
    return "against" in entry or entry.get("fast", False)


def judge(name: str, old: dict, new: dict, measured: dict[str, dict]) -> Finding:
    """Compare one fast path's entries; `measured` holds the rivals of the run."""

    def finding(verdict: Verdict, note: str = "") -> Finding:
        return Finding(name, verdict, old, new, note)

    if not new or "unmeasured" in new:
        return finding(Verdict.MISSING, why_unmeasured(new))
    rival = new["against"]
    absent = "" if "ratio" in new else f"its rival {rival}: {why_unmeasured(measured.get(rival))}"
    if not old:
        return finding(Verdict.NEW, "; ".join(("not recorded yet", *[absent] * bool(absent))))
    for key, value in (("device", old["device"]), ("smoke", old.get("smoke", False))):
        if new.get(key, False) != value:
            raise CannotCompareError(
                f"{name}: {key} is {new.get(key, False)}, in the record {value}; "
                "ratios of different machines or sizes differ"
            )
    if "unmeasured" in old:
        return finding(Verdict.NEW, f"recorded as unmeasured: {old['unmeasured']}")
    if rival != old.get("against", rival):
        return finding(Verdict.MISSING, f"the recorded rival, {old['against']}; record anew to change it")
    if "ratio" in old and "ratio" in new and (drop := 1 - new["ratio"] / old["ratio"]) > RATIO_DROP:
        return finding(Verdict.SLOWER, f"ratio dropped by {drop:.1%}, over {RATIO_DROP:.0%}")
    if is_gpu(new) and (growth := new["median_s"] / old["median_s"] - 1) > GPU_SLOWDOWN:
        return finding(Verdict.SLOWER, f"time grew by {growth:.1%}, over {GPU_SLOWDOWN:.0%}")
    if absent and ("ratio" in old or not is_gpu(new)):
        return finding(Verdict.MISSING, absent)
    if "ratio" not in old and not absent:
        return finding(Verdict.NEW, "recorded without its rival")
    return finding(Verdict.HOLDS, absent)  # on a GPU the time has been judged


def why_unmeasured(entry: dict | None) -> str:
    """Say why a benchmark has no figure."""
    return (entry or {}).get("unmeasured", "not in this run")


def confirm(findings: list[Finding], again: list[Finding]) -> list[Finding]:
    """Replace what failed by its second measurement, which decides; the note tells of the first."""
    second = {finding.name: finding for finding in again}
    return [
        replace(second[f.name], note=f"{second[f.name].note or 'measured again'}; at first: {f.note}")
        if f.verdict is Verdict.SLOWER
        else f
        for f in findings
    ]


def run_suite(path: Path, selection: list[str], options: list[str]) -> dict:
    """Run the benchmarks `selection` (pytest's names, relative to this folder) into the file `path`.

    Raises:
        CannotCompareError: if pytest ends for another reason than failed benchmarks.
    """
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(BENCH / "pytest.ini"), "-q", "--tb=short"]
    command += [*(str(BENCH / name) for name in selection), *options, "--benchmark-json", str(path)]
    status = subprocess.run(command).returncode
    if status not in (0, 1) or not path.exists() or not path.stat().st_size:
        raise CannotCompareError(f"pytest ended with status {status}; its output above names the reason")
    return json.loads(path.read_text())


def measured_twice(arguments: argparse.Namespace, console: Console) -> tuple[dict, list[Finding]]:
    """Measure, compare, and measure again what failed; return the first run and the findings."""
    # On a CPU a fast path's benchmark times its rival too; on a GPU the rival has its own.
    kind = "fast and not full" if device().type == "cpu" else "not full"
    options = ["--smoke"] if arguments.smoke else []
    files = arguments.files or [path.name for path in sorted(BENCH.glob("bench_*.py"))]
    run = run_suite(arguments.output / "last-check.json", files, [*options, "-m", kind])
    recorded = load_record(run, arguments)
    findings = compare(recorded, entries(run))
    suspects = [f for f in findings if f.verdict is Verdict.SLOWER]
    if suspects:
        console.print(f"\n{len(suspects)} may be slower; measuring again:")
        names = {f.name for f in suspects} | {
            f.measured["against"] for f in suspects if "ratio_rounds" not in f.measured
        }
        path = arguments.output / "last-check-again.json"
        second = entries(run_suite(path, sorted(names), [*options, "-m", ""]))
        suspected = {f.name: recorded[f.name] for f in suspects}
        findings = confirm(findings, compare(suspected, second))
    return run, findings


def load_record(run: dict, arguments: argparse.Namespace) -> dict[str, dict]:
    """Return the recorded benchmarks of the run's device, those of the chosen files alone.

    Raises:
        CannotCompareError: if there is no record; if the run is no output of these benchmarks.
    """
    if "device" not in run.get("machine_info", ()):
        raise CannotCompareError("the file is no result of `make bench`, such as bench/last.json")
    name = run["machine_info"]["device"]
    path = arguments.record or RESULTS / f"{device_slug(name)}.json"
    if not path.exists():
        raise CannotCompareError(
            f"nothing is recorded for {name!r} ({path}); on an idle machine: make bench, then "
            "python bench/record.py bench/last.json"
        )
    recorded = json.loads(path.read_text())
    recorded.pop("ceilings", None)
    if arguments.files:
        recorded = {
            key: entry for key, entry in recorded.items() if key.partition("::")[0] in arguments.files
        }
    return recorded


def table(findings: list[Finding]) -> Table:
    """Lay the findings out, those that need a look last."""
    columns = Table(title="fast paths against their rivals", title_justify="left")
    for name, justify in (("benchmark", "left"), ("ratio, recorded", "right"), ("now", "right"),
                          ("change", "right"), ("± half IQR", "right"), ("ms, recorded", "right"),
                          ("now", "right"), ("", "left")):  # fmt: skip
        columns.add_column(name, justify=justify, no_wrap=name != "benchmark", overflow="fold")
    order = list(Verdict)
    for f in sorted(findings, key=lambda f: (order.index(f.verdict), f.name)):
        old, new = f.recorded, f.measured
        both = "ratio" in old and "ratio" in new
        columns.add_row(
            escape(f.name.partition("::")[2] or f.name),
            figure(old, "ratio", "{:.2f}"),
            figure(new, "ratio", "{:.2f}"),
            f"{new['ratio'] / old['ratio'] - 1:+.1%}" if both else "",
            f"{new['ratio_iqr'] / new['ratio'] / 2:.1%}" if "ratio_iqr" in new else "",
            figure(old, "median_s", "{:.3f}", 1e3),
            figure(new, "median_s", "{:.3f}", 1e3),
            f.verdict.value,
            style=STYLES[f.verdict],
        )
    return columns


def figure(entry: dict, field: str, form: str, scale: float = 1.0) -> str:
    """Print an entry's number, nothing where it has none."""
    return form.format(scale * entry[field]) if field in entry else ""


def missed_goals(measured: dict[str, dict]) -> list[str]:
    """Name the goals that a run missed; they are told, not judged, as they hold for an idle machine."""
    missed = []
    for name, entry in measured.items():
        for goal, (value, low, high) in entry.get("goals", {}).items():
            if not (low or -float("inf")) <= value <= (high or float("inf")):
                limit = f"at least {low:g}" if low else f"at most {high:g}"
                missed.append(f"{name}: {goal} is {value:.4g}, the goal {limit}")
    return missed


def report(run: dict, findings: list[Finding], console: Console) -> int:
    """Print the table and what it means; return the exit status."""
    source = origin(run)
    console.print(table(findings))
    console.print(f"{source['device']}, commit {source['commit']}, {source['date']}")
    changed = {
        f"{package} {old} → {source['versions'].get(package, 'absent')}"
        for f in findings
        for package, old in f.recorded.get("versions", {}).items()
        if source["versions"].get(package) != old
    }
    if changed:
        console.print(f"versions differ from the record's: {', '.join(sorted(changed))}")
    for goal in missed_goals(entries(run)):
        console.print(f"goal missed: {goal}", markup=False, soft_wrap=True)
    for f in findings:
        if f.note:
            console.print(f"{f.verdict.value}: {f.name}: {f.note}", markup=False, soft_wrap=True)
    counts = {verdict: sum(f.verdict is verdict for f in findings) for verdict in Verdict}
    console.print(", ".join(f"{n} {verdict.value}" for verdict, n in counts.items() if n))
    if counts[Verdict.SLOWER]:
        return 1
    return 3 if counts[Verdict.MISSING] else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="a file of --benchmark-json, instead of measuring")
    parser.add_argument("--record", type=Path, help="default: results/<this device>.json")
    parser.add_argument("--files", nargs="+", help="bench_*.py to measure and compare; default: all")
    parser.add_argument("--smoke", action="store_true", help="measure tiny sizes, against a record of such")
    parser.add_argument("--output", type=Path, default=BENCH, help="folder for what is measured")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    try:
        if arguments.run:
            run = json.loads(arguments.run.read_text())
            findings = compare(load_record(run, arguments), entries(run))
        else:
            run, findings = measured_twice(arguments, console)
    except CannotCompareError as error:
        console.print(f"cannot compare: {error}", markup=False, soft_wrap=True)
        return 2
    return report(run, findings, console)


if __name__ == "__main__":
    sys.exit(main())
