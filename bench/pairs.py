"""A fast path and its rival timed in turns: the ratio that `check.py` holds against the record.

Machines that others share grow faster and slower by tens of percent within minutes, and a ratio of times
taken one after the other drifts with them. Here each round times both, in alternating order, so that a busy
moment meets both; the median over the rounds is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from machine import clock

ROUND_SECONDS = 0.01
"""A turn lasts about so long, in as many calls as it takes: what the other evicted is soon back in cache."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 50


def against(benchmark, name: str, ours: Callable, rival: Callable[[], Callable], seconds: float) -> None:
    """Name a fast path's rival in the results and, on a CPU, time both in turns.

    On a GPU, which nobody shares, the ratio is that of the medians in the same run (`record.entries`).

    Args:
        benchmark: of the fast path.
        name: of the rival's benchmark in the same file.
        ours: one call of the fast path.
        rival: compares the rival's answers and returns one call of it.
        seconds: about so long is measured.
    """
    file = benchmark.fullname.rpartition("/")[2].partition("::")[0]
    benchmark.extra_info["against"] = f"{file}::{name}"
    if benchmark.enabled and not torch.cuda.is_available():
        benchmark.extra_info |= ratio_in_turns(ours, rival(), seconds)


def ratio_in_turns(ours: Callable, rival: Callable, seconds: float) -> dict[str, float]:
    """Return how many times faster than its rival a fast path is.

    Returns:
        "ratio": median over the rounds; "ratio_iqr": its interquartile range; "ratio_rounds": their number.
    """
    calls = [calls_a_round(run) for run in (ours, rival)]
    start = clock()
    ratios = [round_ratio(ours, rival, calls, swap=False)]
    rounds = min(max(int(seconds / (clock() - start)), LEAST_ROUNDS), MOST_ROUNDS)
    ratios += [round_ratio(ours, rival, calls, swap=n % 2 == 1) for n in range(1, rounds)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return {"ratio": median, "ratio_iqr": high - low, "ratio_rounds": rounds}


def calls_a_round(run: Callable) -> int:
    """How many calls last for `ROUND_SECONDS`; calls once or twice."""
    for _ in range(2):  # the first call may build what later ones reuse
        start = clock()
        run()
        elapsed = clock() - start
        if elapsed > ROUND_SECONDS:
            return 1
    return math.ceil(ROUND_SECONDS / max(elapsed, 1e-7))


def round_ratio(ours: Callable, rival: Callable, calls: list[int], *, swap: bool) -> float:
    """Time both once and return the rival's seconds a call over ours."""
    turns = [(0, ours), (1, rival)]
    seconds = [0.0, 0.0]
    for place, run in reversed(turns) if swap else turns:
        start = clock()
        for _ in range(calls[place]):
            run()
        seconds[place] = (clock() - start) / calls[place]
    return seconds[1] / seconds[0]
