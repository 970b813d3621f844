"""The machine that the benchmarks run on: its clock, its versions, and what it reaches at best."""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import shutil
import subprocess
import time

import numpy as np
import torch

from mgt_fast import roofs
from mgt_fast.roofs import matmul_precision as matmul_precision

PACKAGES = ("torch", "triton", "numpy", "e3nn", "cuequivariance-torch")


def device() -> torch.device:
    """Where the benchmarks run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Name the processor that computes."""
    return roofs.device_name(device())


def versions() -> dict[str, str]:
    """Versions of everything that a time depends on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        if smi := shutil.which("nvidia-smi"):
            query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    return found


def release_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def clock() -> float:
    """Seconds, read once the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def affordable_rounds(run, seconds: float) -> int:
    """How often `run()` fits into so many seconds, between 5 and 30 times; runs it twice."""
    run()
    start = clock()
    run()
    return min(max(int(seconds / (clock() - start)), 5), 30)


def median_time(run, rounds: int = 10, warmup: int = 3) -> float:
    """Median seconds of `run()`."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(rounds):
        start = clock()
        run()
        times.append(clock() - start)
    return float(np.median(times))


def measure_ceilings(size: int, num_bytes: int) -> dict[str, float]:
    """Measure this machine's roofs; see `mgt_fast.roofs.measure_ceilings`."""
    precisions = ("float32", "bf16", "tf32") if torch.cuda.is_available() else ("float32", "bf16")
    return roofs.measure_ceilings(device(), size, num_bytes, precisions)
