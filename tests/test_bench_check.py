"""Whether the benchmarks' regression check tells a slower fast path from a slower machine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
OURS, RIVAL = "bench_kernels.py::bench_kernel[ours]", "bench_kernels.py::bench_kernel[plain]"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


def measurement(name, seconds, **info):
    stats = {"median": seconds, "iqr": seconds / 50, "rounds": 5}
    return {"fullname": name, "group": "g", "stats": stats, "extra_info": info}


def run_of(*benchmarks, gpu=False, device="A processor", unmeasured=(), smoke=False):
    versions = {"torch": "2"} | ({"cuda": "13"} if gpu else {})
    return {
        "machine_info": {"device": device, "versions": versions, "ceilings": {}, "smoke": smoke},
        "datetime": "2026-01-02T03:04:05",
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": list(benchmarks),
        "unmeasured": list(unmeasured),
    }


def pair(ours, rival=1.0, **info):
    """A fast path of `ours` seconds and its rival."""
    return measurement(OURS, ours, against=RIVAL, **info), measurement(RIVAL, rival)


@pytest.fixture
def checked(bench, tmp_path, capsys):
    """Record one run, check another, and return the exit status and what is printed."""

    def check(recorded, run, *options):
        source, target = tmp_path / "recorded.json", tmp_path / "run.json"
        source.write_text(json.dumps(recorded))
        target.write_text(json.dumps(run))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        record = bench("record").record(source, folder)
        status = bench("check").main([str(target), "--record", str(record), *options])
        return status, capsys.readouterr().out

    return check


@pytest.mark.parametrize(("drop", "status"), [(0.099, 0), (0.101, 1), (-0.5, 0)])
def test_a_ratio_may_drop_by_ten_percent(checked, drop, status):
    found, text = checked(run_of(*pair(0.1)), run_of(*pair(0.1 / (1 - drop))))
    assert found == status
    assert ("1 SLOWER" in text) == bool(status)
    assert f"{-drop:+.1%}" in text


@pytest.mark.parametrize(("drop", "status"), [(0.099, 0), (0.101, 1)])
def test_a_ratio_timed_in_turns_counts_before_that_of_the_medians(checked, drop, status):
    recorded = run_of(*pair(0.1, ratio=10.0, ratio_iqr=0.1))
    found, _ = checked(recorded, run_of(*pair(0.1, ratio=10.0 * (1 - drop), ratio_iqr=0.1)))
    assert found == status


def test_a_slower_machine_is_no_regression(checked):
    found, text = checked(run_of(*pair(0.1)), run_of(*pair(0.3, rival=3.0)))
    assert found == 0
    assert "300.000" in text


@pytest.mark.parametrize(("growth", "status"), [(0.049, 0), (0.051, 1)])
def test_on_the_same_gpu_the_time_counts_too(checked, growth, status):
    slower = pair(0.1 * (1 + growth), rival=1.0 + growth)
    found, text = checked(run_of(*pair(0.1), gpu=True), run_of(*slower, gpu=True))
    assert found == status
    assert ("time grew by 5.1%" in text) == bool(status)


def test_a_gpus_time_counts_where_the_rival_never_fitted(checked):
    ours, _ = pair(0.1)
    slower, _ = pair(0.106)
    lacks = [{"name": RIVAL, "reason": "out of memory"}]
    recorded = run_of(ours, gpu=True, unmeasured=lacks)
    assert checked(recorded, run_of(slower, gpu=True, unmeasured=lacks))[0] == 1
    found, text = checked(recorded, run_of(ours, gpu=True, unmeasured=lacks))
    assert found == 0
    assert "out of memory" in text


def test_a_missing_rival_does_not_pass(checked):
    ours, _ = pair(0.1)
    absent = [{"name": RIVAL, "reason": "no module named vesin"}]
    found, text = checked(run_of(*pair(0.1)), run_of(ours, unmeasured=absent))
    assert found == 3
    assert "no module named vesin" in text
    assert checked(run_of(*pair(0.1)), run_of(ours))[0] == 3


def test_another_rival_does_not_pass(checked):
    other = measurement(OURS, 0.1, against="bench_kernels.py::bench_kernel[easy]")
    easy = measurement("bench_kernels.py::bench_kernel[easy]", 5.0)
    found, text = checked(run_of(*pair(0.1)), run_of(other, easy))
    assert found == 3
    assert RIVAL in text


def test_a_benchmark_that_is_gone_does_not_pass(checked):
    found, text = checked(run_of(*pair(0.1)), run_of(measurement(RIVAL, 1.0)))
    assert found == 3
    assert OURS in text
    assert "not in this run" in text


def test_wrong_answers_do_not_pass(checked):
    failed = [{"name": OURS, "reason": "AssertionError: off by 1e-2", "fast": True}]
    found, text = checked(run_of(*pair(0.1)), run_of(measurement(RIVAL, 1.0), unmeasured=failed))
    assert found == 3
    assert "off by 1e-2" in text
    new = "bench_kernels.py::bench_kernel[new]"
    failed = [{"name": new, "reason": "AssertionError: off by 1e-2", "fast": True}]
    assert checked(run_of(*pair(0.1)), run_of(*pair(0.1), unmeasured=failed))[0] == 3


def test_a_new_benchmark_is_named(checked):
    new = measurement("bench_kernels.py::bench_kernel[new]", 0.1, against=RIVAL)
    found, text = checked(run_of(*pair(0.1)), run_of(*pair(0.1), new))
    assert found == 0
    assert "1 holds, 1 new" in text
    assert "bench_kernel[new]: not recorded yet" in text


def test_long_benchmarks_may_be_left_out(checked):
    long = measurement("bench_kernels.py::bench_kernel[long]", 9.0, against=RIVAL, full=True)
    assert checked(run_of(*pair(0.1), long), run_of(*pair(0.1)))[0] == 0
    other = measurement("bench_kernels.py::bench_kernel[longer]", 9.0, against=RIVAL, full=True)
    assert checked(run_of(*pair(0.1), long), run_of(*pair(0.1), other))[0] == 3


def test_files_can_be_chosen(checked):
    data = measurement("bench_data.py::bench_gather[ours]", 0.1, against="bench_data.py::bench_gather[take]")
    take = measurement("bench_data.py::bench_gather[take]", 0.1)
    recorded = run_of(*pair(0.1), data, take)
    assert checked(recorded, run_of(*pair(0.1)))[0] == 3
    assert checked(recorded, run_of(*pair(0.1)), "--files", "bench_kernels.py")[0] == 0


def test_missed_goals_are_told(checked):
    info = {"goals": {"crystals_per_s": [2e5, 3e5, None], "share": [0.2, None, 0.1]}}
    found, text = checked(run_of(*pair(0.1)), run_of(*pair(0.1, **info)))
    assert found == 0
    assert "crystals_per_s is 2e+05, the goal at least 300000" in text
    assert "share is 0.2, the goal at most 0.1" in text


def test_differing_versions_are_told(checked):
    run = run_of(*pair(0.1))
    run["machine_info"]["versions"] = {"torch": "3"}
    assert "torch 2 → 3" in checked(run_of(*pair(0.1)), run)[1]


def test_what_cannot_be_compared_is_refused(checked, bench, tmp_path, capsys):
    recorded = run_of(*pair(0.1))
    for run, reason in (
        (run_of(*pair(0.1), device="Another"), "device is Another"),
        (run_of(*pair(0.1), smoke=True), "smoke is True"),
    ):
        found, text = checked(recorded, run)
        assert found == 2
        assert reason in text
    assert checked(run_of(measurement(RIVAL, 1.0)), run_of(measurement(RIVAL, 1.0)))[0] == 2
    (tmp_path / "run.json").write_text(json.dumps(run_of(*pair(0.1), device="Nowhere")))
    assert bench("check").main([str(tmp_path / "run.json")]) == 2
    assert "nothing is recorded for 'Nowhere'" in capsys.readouterr().out


def test_a_second_measurement_decides(bench):
    check, entries = bench("check"), bench("record").entries
    recorded = entries(run_of(*pair(0.1)))
    slow, fine = entries(run_of(*pair(0.2))), entries(run_of(*pair(0.1)))
    first = check.compare(recorded, slow)
    assert [f.verdict for f in check.confirm(first, check.compare(recorded, fine))] == [check.Verdict.HOLDS]
    (found,) = check.confirm(first, check.compare(recorded, slow))
    assert found.verdict is check.Verdict.SLOWER
    assert "at first: ratio dropped by 50.0%" in found.note
    (found,) = check.confirm(first, check.compare(recorded, {}))
    assert found.verdict is check.Verdict.MISSING


def test_ratios_in_turns_do_not_see_a_busy_machine(bench, monkeypatch):
    pairs = bench("pairs")
    now = 0.0

    def takes(seconds):
        def run():
            nonlocal now
            now += seconds * (3.0 if 1.0 < now < 2.0 else 1.0)  # for a while all takes three times as long

        return run

    monkeypatch.setattr(pairs, "clock", lambda: now)
    found = pairs.ratio_in_turns(takes(0.02), takes(0.1), seconds=5.0)
    assert found["ratio"] == pytest.approx(5.0)
    assert found["ratio_iqr"] == pytest.approx(0.0, abs=1e-9)
    assert found["ratio_rounds"] == 41


SLOWDOWN = """
import functools
from mgt_fast.kernels import segments

def doubled(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        function(*args, **kwargs)
        return function(*args, **kwargs)
    return run

segments.sum_rows = doubled(segments.sum_rows)
"""


def test_a_fast_path_that_does_its_work_twice_is_caught(bench, tmp_path):
    """From the suite through record and check to the exit status, measured twice."""
    (tmp_path / "slowdown.py").write_text(SLOWDOWN)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    wanted = "-p no:cacheprovider -k segment_sum-forward"

    def run(*command, plugins=wanted):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env=environment | {"PYTEST_ADDOPTS": plugins},
            capture_output=True,
            text=True,
        )

    suite = ("-m", "pytest", "-c", BENCH / "pytest.ini", BENCH / "bench_kernels.py", "--smoke", "-m", "fast")
    measured = run(*suite, "--benchmark-json", tmp_path / "run.json")
    assert measured.returncode == 0, measured.stdout
    record = bench("record").record(tmp_path / "run.json", tmp_path)

    check = (BENCH / "check.py", "--record", record)
    same = run(*check, tmp_path / "run.json")
    assert same.returncode == 0, same.stdout + same.stderr
    assert "1 holds" in same.stdout

    again = ("--smoke", "--files", "bench_kernels.py", "--output", tmp_path)
    slower = run(*check, *again, plugins=f"{wanted} -p slowdown")
    assert slower.returncode == 1, slower.stdout + slower.stderr
    assert "measuring again" in slower.stdout
    assert "SLOWER: bench_kernels.py::bench_kernel[segment_sum-forward" in slower.stdout
    assert "at first: ratio dropped by" in slower.stdout
