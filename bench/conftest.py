"""Options and hooks of the benchmarks.

`--smoke` takes tiny sizes, to see that everything runs; `--seconds` starts no benchmark after so many. The
mark `fast` stands on fast paths, which name their rivals (`pairs.against`), `full` on what `make bench`
leaves out. A benchmark without a figure (out of memory, out of time, failed) is listed under "unmeasured" in
the results, with the reason.
"""

from __future__ import annotations

import math
import os
import time

import pytest
import torch

STARTED = pytest.StashKey[float]()
UNMEASURED = pytest.StashKey[list]()
CEILINGS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--smoke", action="store_true", help="tiny sizes, to see that everything runs")
    parser.addoption("--seconds", type=float, default=math.inf, help="start nothing after so many seconds")


def pytest_configure(config):
    config.stash[STARTED] = time.monotonic()
    config.stash[UNMEASURED] = []
    config.stash[CEILINGS] = {}
    if config.getoption("smoke") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton's import, that is before `machine`'s


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a benchmark if there is time for it, and skip it if there is not the memory."""
    if time.monotonic() - pyfuncitem.config.stash[STARTED] > pyfuncitem.config.getoption("seconds"):
        pytest.skip("out of time")
    from machine import release_memory

    release_memory()
    try:
        return (yield)
    except torch.OutOfMemoryError:
        pass  # skipping here would keep the error's frames alive, and all they hold
    release_memory()
    pytest.skip("out of memory")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    meant_elsewhere = call.when == "setup" and report.skipped
    if call.excinfo is not None and not meant_elsewhere:
        reason = str(call.excinfo.value).partition("\n")[0] or call.excinfo.typename
        fast = item.get_closest_marker("fast") is not None and not report.skipped
        failure = {"name": item.nodeid.rpartition("/")[2], "reason": reason[:300], "fast": fast}
        item.config.stash[UNMEASURED].append(failure)
    return report


def pytest_benchmark_update_json(config, benchmarks, output_json):
    from machine import device_name, versions

    output_json["machine_info"] |= {
        "device": device_name(),
        "versions": versions(),
        "ceilings": config.stash[CEILINGS],
        "smoke": config.getoption("smoke"),
    }
    output_json["unmeasured"] = config.stash[UNMEASURED]


@pytest.fixture(autouse=True)
def _scope(request, benchmark):
    """Note in the results which benchmarks `make bench` leaves out."""
    if request.node.get_closest_marker("full"):
        benchmark.extra_info["full"] = True


@pytest.fixture(scope="session")
def ceilings(request) -> dict[str, float]:
    """What this machine reaches at best; see `machine.measure_ceilings`."""
    from machine import measure_ceilings

    found = request.config.stash[CEILINGS]
    if not found:
        small = request.config.getoption("smoke")
        size = 256 if small else 8192 if torch.cuda.is_available() else 2048
        found |= measure_ceilings(size, num_bytes=2**20 if small else 2**30)
    return found
