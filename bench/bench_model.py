"""Training steps and predictions of MGT beside the plain PyTorch + e3nn reference, on bundled crystals.

Every program starts from the same weights and must first give the right answers: its loss and gradient, or
its predictions, may be off by at most `rivals.ERROR_RATIO` times the error of the uncompiled reference in the
same precision, both measured against the reference in float64. On a GPU all sizes, widths and precisions are
run, the most telling first; on a CPU both programs in float32 and bfloat16 at the published width. Every run
of `MGT` has a reference of the same run to beat: on a CPU in the same precision, on a GPU in float32;
compiled programs the compiled one.

In the results beside the times: `bytes_per_edge` is the peak of a step above what network, optimiser state,
gradients and graph take; `tflops` counts the operations of the merged algebra (`costs.model_flops`) whoever
computes, and `share` compares it with the measured rate of large bfloat16 products.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pairs
import pytest
import torch
from costs import Sizes, model_flops
from graphs import real_graph
from machine import affordable_rounds, clock
from rivals import (
    CAPTURED_RIVALS,
    COMPILED_RIVALS,
    CPU_RIVALS,
    EAGER_RIVALS,
    REFERENCE,
    TASKS,
    Rival,
    Runner,
    checked_runner,
)

ROUND_SECONDS = 1.0  # about so long is a benchmark repeated
PAIR_SECONDS = 10.0
CPU_EDGES = 4_000  # what a CPU does in a few seconds
COMPILED: dict[tuple, tuple[Runner, dict[str, float]]] = {}


@dataclass(frozen=True)
class Case:
    """One benchmark; the batch has `edges` edges at least, or `crystals` crystals."""

    work: str
    channels: int
    rival: Rival
    edges: int = 0
    crystals: int = 1
    smoke: bool = False

    @property
    def full(self) -> bool:
        """Whether `make bench` leaves the case out: on a CPU, bfloat16 and long steps."""
        if self.smoke or torch.cuda.is_available():
            return False
        return self.edges > CPU_EDGES or self.rival.precision != "float32"

    @property
    def against(self) -> Case | None:
        """The case that a run of `MGT` is compared with; None for the reference's own."""
        if self.rival.model == "reference":
            return None
        if torch.cuda.is_available() and not self.rival.compiled:
            return replace(self, rival=REFERENCE)
        return replace(self, rival=replace(self.rival, model="reference", captured=False))

    @property
    def batch(self) -> str:
        if not self.edges:
            return f"{self.crystals} crystals"
        return f"{self.edges // 1000}k edges" if self.edges >= 1000 else f"{self.edges} edges"

    @property
    def group(self) -> str:
        return f"{self.work}, C = {self.channels}, {self.batch}"

    def __str__(self):
        return "-".join((self.work, f"C{self.channels}", self.batch, str(self.rival))).replace(" ", "_")


def cases(smoke: bool) -> list[Case]:
    """What is run here, in order of value."""
    rivals = EAGER_RIVALS + COMPILED_RIVALS
    if smoke:
        sizes = [("training step", 16, 20, 1)]
        if not torch.cuda.is_available():
            rivals = (*CPU_RIVALS, Rival("triton"), *COMPILED_RIVALS[:1])
    elif torch.cuda.is_available():
        sizes = [
            ("training step", 256, 100_000, 1),
            ("training step", 256, 1_000_000, 1),
            ("training step", 256, 300_000, 1),
            ("fine-tuning step", 256, 0, 32),
            ("training step", 256, 30_000, 1),
            ("training step", 256, 10_000, 1),
            ("prediction", 256, 100_000, 1),
            ("fine-tuning step", 256, 0, 8),
            ("training step", 128, 100_000, 1),
            ("training step", 512, 100_000, 1),
            ("training step", 128, 1_000_000, 1),
            ("training step", 512, 1_000_000, 1),
        ]
    else:
        sizes = [("training step", 256, CPU_EDGES, 1), ("prediction", 256, CPU_EDGES, 1)]
        sizes += [(work, 256, 10_000, 1) for work in TASKS]
        rivals = CPU_RIVALS
    captured = torch.cuda.is_available() and not smoke
    return [
        Case(work, channels, rival, edges, crystals, smoke)
        for work, channels, edges, crystals in sizes
        for rival in (*rivals, *(CAPTURED_RIVALS if captured and work == "fine-tuning step" else ()))
    ]


def pytest_generate_tests(metafunc):
    found = cases(metafunc.config.getoption("smoke"))
    marked = [
        pytest.param(
            case, marks=[pytest.mark.fast] * (case.against is not None) + [pytest.mark.full] * case.full
        )
        for case in found
    ]
    metafunc.parametrize("case", marked, ids=map(str, found))


def runner_of(case: Case) -> tuple[Runner, dict[str, float]]:
    """Return the checked runner of a case and its errors; compiled ones serve every size."""
    key = (case.rival, case.channels, case.work)
    if key in COMPILED:
        return COMPILED[key]
    check_edges = 20 if case.smoke else 1500
    compiler = "eager" if case.smoke else "inductor"
    made = checked_runner(case.rival, case.channels, case.work, check_edges=check_edges, compiler=compiler)
    if case.rival.compiled:
        COMPILED[key] = made
    return made


def bytes_per_edge(case: Case, runner: Runner) -> float | None:
    """Peak memory of one step above what stays, by edge; a CPU's smoke test leaves it out."""
    if torch.cuda.is_available():
        graph = real_graph(case.edges, case.crystals)
        step = runner.step(graph)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / graph.num_edges
    if case.smoke:
        return None
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(resident_bytes_per_edge, case).result()


def resident_bytes_per_edge(case: Case) -> float:
    """The same on a CPU (Linux); run it in a process of its own."""
    runner = Runner(case.rival, case.channels, case.work)
    runner.step(real_graph(1))()  # makes gradients and optimiser state
    graph = real_graph(case.edges, case.crystals)
    step = runner.step(graph)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmHWM")
    step()
    return (resident("VmHWM") - before) / graph.num_edges


def resident(entry: str) -> int:
    """Return an entry of this process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


def checked_step(case: Case) -> Callable:
    """Return a case's step, once its answers have been compared."""
    runner, _ = runner_of(case)
    return runner.step(real_graph(case.edges, case.crystals))


@pytest.mark.benchmark(timer=clock)
def bench_model(benchmark, case, ceilings):
    benchmark.group = case.group
    runner, errors = runner_of(case)
    graph = real_graph(case.edges, case.crystals)
    with runner.precision():
        memory = bytes_per_edge(case, runner)
        step = runner.step(graph)
        benchmark.pedantic(step, rounds=1 if case.smoke else affordable_rounds(step, ROUND_SECONDS))
        if case.against:
            pairs.against(
                benchmark,
                f"bench_model[{case.against}]",
                step,
                partial(checked_step, case.against),
                PAIR_SECONDS,
            )
    if not benchmark.stats:  # nothing is timed with --benchmark-disable
        return
    seconds = benchmark.stats["median"]
    sizes = Sizes(graph.num_atoms, graph.num_edges, graph.num_crystals, **runner.sizes)
    flops = model_flops(sizes) * (1 if case.work == "prediction" else 3)
    benchmark.extra_info |= {
        "rival": str(case.rival),
        "atoms": graph.num_atoms,
        "edges": graph.num_edges,
        "crystals": graph.num_crystals,
        "us_per_edge": seconds / graph.num_edges * 1e6,
        "edges_per_s": graph.num_edges / seconds,
        "crystals_per_s": graph.num_crystals / seconds,
        "bytes_per_edge": memory,
        "tflops": flops / seconds / 1e12,
        "share": flops / seconds / ceilings["bf16"],
        "errors": errors,
    }
