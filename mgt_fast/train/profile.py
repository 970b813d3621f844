"""Where the time of a training step goes: steady steps under a profiler, and two tables of what it saw."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity

from ..distributed import Ranks
from ..profiling import layer_ranges, recording, span
from ..roofs import Cost, OperationCounter, Tally, device_name, measure_ceilings
from .capture import CapturedStep
from .config import FinetuneConfig, PretrainConfig, RunConfig
from .finetune import finetuning_task
from .loop import Fit
from .pretrain import pretraining_task
from .runlog import NullLog
from .setup import start_torch
from .traces import IDLE, OTHER, STEPS, Analysis, OperationTime, Owner, analyse

TRACE, PROFILE = "trace.json", "profile.json"


@dataclass(frozen=True)
class RangeShare:
    """A range's part of a step.

    Attributes:
        range: its name.
        forward_s, backward_s: seconds a step, in the backward pass and outside of it.
        share: of the step; those of all ranges add up to 1.
    """

    range: str
    forward_s: float
    backward_s: float
    share: float


@dataclass(frozen=True)
class KernelTime:
    """Calls and seconds of a GPU's kernel in a step."""

    kernel: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class OperationShare:
    """What an operation's calls take and must do at least, a step.

    Attributes:
        operation: its name; that of a kernel, if no counted operation started it.
        calls, seconds: on a GPU, `seconds` are those of its kernels.
        share: of the step.
        flops, bytes: products, and bytes of inputs and outputs; None of a kernel alone.
        roof: the nearer one, "products" or "memory".
        roof_share: the time it takes at least over the time it took.
        kernels: on a GPU.
    """

    operation: str
    calls: float
    seconds: float
    share: float
    flops: float | None
    bytes: float | None
    roof: str | None
    roof_share: float | None
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Profile:
    """Where the time of a training step went.

    Attributes:
        device: its name.
        torch: version.
        precision: of products.
        steps: number of steps looked at.
        step_s: seconds of a step.
        traced_step_s: of a step while it was traced, which the tables share out.
        clock: whose time that is: "host", or "gpu".
        ceilings: see `roofs.measure_ceilings`.
        ranges: in the order of the step.
        host_ranges: likewise for the host, where `clock` is "gpu".
        operations: the longest first.
    """

    device: str
    torch: str
    precision: str
    steps: int
    step_s: float
    traced_step_s: float
    clock: Literal["host", "gpu"]
    ceilings: dict[str, float]
    ranges: tuple[RangeShare, ...]
    host_ranges: tuple[RangeShare, ...]
    operations: tuple[OperationShare, ...]


class _Steps:
    """The steps of a run, one after the other, without what happens between epochs."""

    def __init__(self, config: RunConfig):
        self.device = start_torch(config)
        ranks = Ranks()
        if isinstance(config, PretrainConfig):
            task, _ = pretraining_task(config, self.device, ranks)
        else:
            task, _ = finetuning_task(config, self.device, ranks)
        captures = isinstance(config, FinetuneConfig) and config.capture
        step = CapturedStep(task, config.optim.weight_decay, config.optim.grad_clip) if captures else None
        log = NullLog(Path(), Console(quiet=True))
        self.fit = Fit(task, config.optim, log, save=lambda *_: None, training_step=step, ranks=ranks)
        self._batches = (batch for epoch in count(1) for batch in task.batches(epoch))
        self.model = task.model.train()

    def take(self, number: int) -> float:
        """Take steps and return how many seconds they took."""
        start = time.perf_counter()
        for batch in islice(self._batches, number):
            self.fit.take_step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start


def open_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """Make the folder of a profile.

    Raises:
        FileExistsError: if it holds one and `overwrite` is false.
    """
    folder = Path(folder)
    held = [name for name in (TRACE, PROFILE) if (folder / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {', '.join(held)}; choose another folder or pass --overwrite"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def profile_steps(
    config: PretrainConfig | FinetuneConfig, folder: str | Path, steps: int = 10, warmup: int = 3
) -> Profile:
    """Trace steady steps of a run and leave trace.json and profile.json.

    The steps are taken twice, from the same beginning: once traced, and once to count what operations must
    do, which takes longer. The steps that follow the traced ones are timed as they are.

    Args:
        config: the run, on a single rank.
        folder: where the files go; it exists.
        steps: steps to look at.
        warmup: steps before them.

    Raises:
        ConfigError, DataError, NonFiniteLossError: as the run itself.
    """
    folder, precision = Path(folder), config.precision
    run = _Steps(config)
    device = run.device
    ceilings = _ceilings(device, precision)
    run.take(warmup)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with (
        torch.profiler.profile(activities=activities) as profiler,
        recording("trace"),
        layer_ranges(run.model),
        span(STEPS),
    ):
        run.take(steps)
    profiler.export_chrome_trace(str(folder / TRACE))
    step_s = run.take(steps) / steps
    again = _ceilings(device, precision)  # others may have been at work on the machine
    ceilings = {name: max(rate, again[name]) for name, rate in ceilings.items()}
    del run, profiler
    gc.collect()  # before there is a second network
    tallies = _count(config, ceilings, steps, warmup)
    analysis = analyse(json.loads((folder / TRACE).read_bytes()), tallies)
    profile = Profile(
        device=device_name(device),
        torch=torch.__version__,
        precision=precision,
        steps=steps,
        step_s=step_s,
        traced_step_s=analysis.seconds / steps,
        clock="host" if analysis.device is None else "gpu",
        ceilings=ceilings,
        ranges=_range_shares(analysis.device or analysis.host, steps),
        host_ranges=() if analysis.device is None else _range_shares(analysis.host, steps),
        operations=_operation_shares(analysis, tallies, ceilings, precision, steps),
    )
    (folder / PROFILE).write_text(json.dumps(asdict(profile), indent=1) + "\n", encoding="utf-8")
    return profile


def run_steps(config: PretrainConfig | FinetuneConfig, steps: int = 10, warmup: int = 3) -> None:
    """Take steps for NVIDIA's profilers: with NVTX ranges, the steady ones in a cudaProfiler range.

    Raises:
        ValueError: without a CUDA device.
        ImportError: without NVTX.
    """
    with recording("nvtx"):
        run = _Steps(config)
        if run.device.type != "cuda":
            raise ValueError(f"nsys and ncu look at a CUDA device, and the run is on {run.device}")
        with layer_ranges(run.model, backward=True):
            run.take(warmup)
            with torch.cuda.profiler.profile():
                run.take(steps)


def _count(config: RunConfig, ceilings: dict[str, float], steps: int, warmup: int) -> dict[str, Tally]:
    run = _Steps(config)
    run.take(warmup)
    with OperationCounter(ceilings) as counter:
        run.take(steps)
    return counter.tallies


def _ceilings(device: torch.device, precision: str) -> dict[str, float]:
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (1024, 2**27)
    return measure_ceilings(device, size, num_bytes, dict.fromkeys(("float32", precision)))


def _range_shares(seconds: dict[Owner, float], steps: int) -> tuple[RangeShare, ...]:
    total = sum(seconds.values())
    found = []
    names = dict.fromkeys(owner.range for owner in seconds)
    for name in sorted(names, key=lambda name: (name == IDLE, name == OTHER)):
        forward, backward = (seconds.get(Owner(name, way), 0.0) for way in (False, True))
        share = (forward + backward) / total
        found.append(RangeShare(name, forward / steps, backward / steps, share))
    return tuple(found)


def _operation_shares(
    analysis: Analysis, tallies: dict[str, Tally], ceilings: dict[str, float], precision: str, steps: int
) -> tuple[OperationShare, ...]:
    def described(name: str, found: OperationTime) -> OperationShare:
        tally = tallies.get(name, Tally())
        # Per call: what hides inside another operation while it is traced may be counted by itself.
        part = found.calls / tally.calls if tally.calls else 0.0
        cost = Cost(part * tally.flops, part * tally.bytes) if part else None
        kernels = (
            KernelTime(kernel, one.calls / steps, one.seconds / steps)
            for kernel, one in found.kernels.items()
        )
        return OperationShare(
            operation=name,
            calls=found.calls / steps,
            seconds=found.seconds / steps,
            share=found.seconds / analysis.seconds,
            flops=cost and cost.flops / steps,
            bytes=cost and cost.bytes / steps,
            roof=cost and cost.roof(ceilings[precision], ceilings["copy"]),
            roof_share=cost and found.seconds and part * tally.floor / found.seconds,
            kernels=tuple(sorted(kernels, key=lambda one: -one.seconds)),
        )

    found = [described(name, operation) for name, operation in analysis.operations.items()]
    return tuple(sorted(found, key=lambda one: (-one.seconds, one.operation)))
