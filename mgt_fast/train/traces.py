"""What a trace of torch.profiler says about the steps in it: the share of each range, the time of operations.

A trace is read as it was written ("Trace Event Format"). What the host did are nested events, thread by
thread. A moment belongs to the range around what was done then; in a backward pass, to the range whose
forward pass made the node, as the trace links them. On a GPU, a moment belongs to the range that started what
runs. So every moment of the steps has one owner, and the shares add up to 1.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from ..profiling import DOMAIN
from ..roofs import operation_name

STEPS = "steps"
"""The range around all the steps."""
BACKWARD, COMMUNICATION = "backward", "communication"
OTHER = "other"
"""The host, outside of every range."""
IDLE = "idle"
"""A GPU with nothing to do."""

_HOST = {"cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"}
_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_PREFIX = f"{DOMAIN}/"
_NODE = "autograd::engine::evaluate_function: "


class Owner(NamedTuple):
    """Whose a moment is: a range, and whether it is of the backward pass."""

    range: str
    backward: bool = False


@dataclass(eq=False)
class _Event:
    """What the host did; times in ns.

    Attributes:
        owner: the range it lies in, or is.
        operation: the outermost counted operation around it, or itself.
    """

    name: str
    start: int
    end: int
    owner: Owner
    operation: _Event | None = None


@dataclass
class OperationTime:
    """Calls of an operation and their seconds: on a GPU, those of its kernels, which are listed by name."""

    calls: int = 0
    seconds: float = 0.0
    kernels: dict[str, OperationTime] = field(default_factory=dict)

    def add(self, seconds: float):
        """Add a call."""
        self.calls += 1
        self.seconds += seconds


@dataclass(frozen=True)
class Analysis:
    """Where the time of the steps in a trace went.

    Attributes:
        seconds: of all steps.
        host: seconds of each owner on the thread that trains; they add up to `seconds`.
        device: likewise on the GPU, if one was at work.
        operations: time of the counted operations by name; on a GPU also of kernels outside of all of them.
    """

    seconds: float
    host: dict[Owner, float]
    device: dict[Owner, float] | None
    operations: dict[str, OperationTime]


def analyse(trace: dict, counted: Collection[str]) -> Analysis:
    """Share out the time of the steps in a trace.

    Args:
        trace: the trace as JSON, with a range `STEPS` around the steps.
        counted: operations whose time is wanted (see `roofs.operation_name`); of nested ones, the outermost
            counts.

    Raises:
        ValueError: if there is no such range.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") in ("X", "s", "f")]
    steps = next((event for event in events if event["name"] == _PREFIX + STEPS), None)
    if steps is None:
        raise ValueError(f"the trace has no range {_PREFIX + STEPS!r} around the steps")
    start, end, main = *_times(steps), steps["tid"]
    inside = [event for event in events if event["ph"] == "X" and start <= _ns(event["ts"]) < end]
    threads, launches = _host_events(inside, _links(events), main, counted)
    device = [event for event in inside if event.get("cat") in _DEVICE]
    operations: defaultdict[str, OperationTime] = defaultdict(OperationTime)
    intervals = []
    for event in device:
        launch = launches.get(event["args"].get("correlation"))
        owner = Owner(OTHER) if launch is None else launch.owner
        if event["name"].startswith("nccl"):
            owner = Owner(COMMUNICATION)
        intervals.append((*_times(event), owner))
        seconds = event["dur"] * 1e-6
        operation = None if launch is None else launch.operation
        if operation is None:
            operations[event["name"]].add(seconds)
        else:
            found = operations[operation_name(operation.name)]
            found.seconds += seconds
            found.kernels.setdefault(event["name"], OperationTime()).add(seconds)
    for host_event in (event for thread in threads.values() for event in thread):
        if host_event.operation is host_event:
            if device:
                operations[operation_name(host_event.name)].calls += 1
            else:
                operations[operation_name(host_event.name)].add((host_event.end - host_event.start) * 1e-9)
    host = [(event.start, event.end, event.owner) for event in threads[main]]
    return Analysis(
        seconds=(end - start) * 1e-9,
        host=_share_out(host, start, end, OTHER),
        device=_share_out(intervals, start, end, IDLE) if device else None,
        operations=dict(operations),
    )


def _ns(microseconds: float) -> int:
    return round(1000 * microseconds)


def _times(event: dict) -> tuple[int, int]:
    """Start and end in ns."""
    return _ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"])


def _links(events: Iterable[dict]) -> dict[tuple[int, int], tuple[int, int]]:
    """Where the forward operation of each node of a backward pass is: thread and start of either."""
    flows = [event for event in events if event.get("cat") == "fwdbwd"]
    forward = {event["id"]: (event["tid"], _ns(event["ts"])) for event in flows if event["ph"] == "s"}
    return {
        (event["tid"], _ns(event["ts"])): forward[event["id"]]
        for event in flows
        if event["ph"] == "f" and event["id"] in forward
    }


def _host_events(
    events: list[dict], links: dict, main: int, counted: Collection[str]
) -> tuple[dict[int, list[_Event]], dict[int, _Event]]:
    """Find the owner of everything that the host did.

    Returns:
        Events by thread, each in the order of their starts, and what started a GPU's work, by correlation.
    """
    threads: defaultdict[int, list[_Event]] = defaultdict(list)
    launches, forward, stacks = {}, {}, defaultdict(list)
    host = [event for event in events if event.get("cat") in _HOST]
    # Other threads wait for the one that trains, or work for it: there they belong to what it is at.
    host.sort(key=lambda event: (event["tid"] != main, event["tid"], _ns(event["ts"]), -event["dur"]))
    for place, event in enumerate(host):
        name, tid, (start, end) = event["name"], event["tid"], _times(event)
        stack = stacks[tid]
        while stack and stack[-1].end <= start:
            stack.pop()
        parent = stack[-1] if stack else None
        if parent is not None:
            owner = parent.owner
        else:
            owner = Owner(OTHER) if tid == main else _owner_at(threads[main], start)
        if name.startswith(_PREFIX) and name != _PREFIX + STEPS:
            name_of_range = name.removeprefix(_PREFIX)
            owner = Owner(name_of_range, owner.backward or name_of_range == BACKWARD)
        elif name.startswith(_NODE) and place + 1 < len(host):
            node = host[place + 1]  # the node itself, inside
            maker = forward.get(links.get((node["tid"], _ns(node["ts"]))))
            if maker is not None and maker.range != OTHER:
                owner = Owner(maker.range, True)
        found = _Event(name, start, end, owner, None if parent is None else parent.operation)
        if event["cat"] == "cpu_op":
            forward[tid, start] = owner
            if found.operation is None and operation_name(name) in counted:
                found.operation = found
        if "correlation" in event.get("args", ()):
            launches[event["args"]["correlation"]] = found
        threads[tid].append(found)
        stack.append(found)
    return threads, launches


def _owner_at(events: list[_Event], time: int) -> Owner:
    """Return the owner of the innermost event around a time, of a thread's events."""
    place = bisect_right(events, time, key=lambda event: event.start)
    around = (event.owner for event in reversed(events[:place]) if event.end > time)
    return next(around, Owner(OTHER))


def _share_out(
    intervals: Iterable[tuple[int, int, Owner]], start: int, end: int, rest: str
) -> dict[Owner, float]:
    """Give every moment from start to end to the interval around it that began last, or to the rest.

    Args:
        intervals: start, end and owner each; of those that start together, an outer one comes first.
        start, end: of what is shared out, ns.
        rest: who gets what lies in no interval.

    Returns:
        Seconds by owner; they add up to those from start to end.
    """
    ordered = sorted(intervals, key=lambda interval: (interval[0], -interval[1]))
    cuts = {start, end, *(cut for interval in ordered for cut in interval[:2] if start < cut < end)}
    shares: Counter[Owner] = Counter()
    active: list[int] = []  # places of intervals that have begun, negative: the last on top
    begun = 0
    for left, right in pairwise(sorted(cuts)):
        while begun < len(ordered) and ordered[begun][0] <= left:
            heapq.heappush(active, -begun)
            begun += 1
        while active and ordered[-active[0]][1] <= left:
            heapq.heappop(active)
        shares[ordered[-active[0]][2] if active else Owner(rest)] += right - left
    return {owner: nanoseconds * 1e-9 for owner, nanoseconds in shares.items()}
