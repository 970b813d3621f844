"""A profile as text: two tables, and command lines for NVIDIA's profilers."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from .profile import KernelTime, OperationShare, Profile, RangeShare

SHOWN = 20
"""Operations in the table; the others are added up."""
_WIDEST = 48


def report(profile: Profile) -> str:
    """Return both tables."""
    clock = "time on the GPU" if profile.clock == "gpu" else "time"
    lines = [
        f"{profile.steps} steps on {profile.device}, {profile.precision}, torch {profile.torch}: "
        f"{profile.step_s * 1e3:.2f} ms a step, {profile.traced_step_s * 1e3:.2f} ms while traced",
        "",
        f"share of the step by range, {clock} in ms",
        *_range_lines(profile.ranges),
    ]
    if profile.host_ranges:
        lines += ["", "the same by the host's clock", *_range_lines(profile.host_ranges)]
    ceilings = dict(profile.ceilings)
    roofs = [f"memory {_rate(ceilings.pop('copy'))}B/s"]
    roofs += [f"{name} {_rate(rate)}FLOP/s" for name, rate in ceilings.items()]
    lines += ["", f"operations a step, {clock} in ms, under the roofs: {', '.join(roofs)}"]
    return "\n".join([*lines, *_operation_lines(profile)])


def _rate(value: float) -> str:
    return f"{value / 1e12:.2f} T" if value >= 1e12 else f"{value / 1e9:.1f} G"


def _range_lines(ranges: Sequence[RangeShare]) -> Iterator[str]:
    forward, backward, share = (
        sum(getattr(one, name) for one in ranges) for name in ("forward_s", "backward_s", "share")
    )
    width = max(len(one.range) for one in ranges)
    yield f"{'range':<{width}}  {'forward':>9}  {'backward':>9}  {'share':>6}"
    for one in (*ranges, RangeShare("sum", forward, backward, share)):
        times = (f"{time * 1e3:.3f}" if time else "-" for time in (one.forward_s, one.backward_s))
        yield f"{one.range:<{width}}  {'  '.join(f'{time:>9}' for time in times)}  {one.share:6.1%}"


def _operation_lines(profile: Profile) -> Iterator[str]:
    shown, others = profile.operations[:SHOWN], profile.operations[SHOWN:]
    names = [name for one in shown for name in (one.operation, *map(_indented, one.kernels))]
    width = min(max(map(len, ["between them", *names])), _WIDEST)

    def row(name: str, calls: float | None, seconds: float, share: float | None) -> str:
        return (
            f"{name[:width]:<{width}}  {'' if calls is None else f'{calls:.0f}':>6}  {seconds * 1e3:8.3f}"
            f"  {'' if share is None else f'{share:.1%}':>6}"
        )

    yield (
        f"{'operation':<{width}}  {'calls':>6}  {'time':>8}  {'share':>6}  {'GFLOP':>8}  {'MB':>8}  "
        f"{'roof':<8}  {'of roof':>7}"
    )
    for one in shown:
        yield row(one.operation, one.calls, one.seconds, one.share) + _under_roof(one)
        for kernel in one.kernels:
            yield row(_indented(kernel), kernel.calls, kernel.seconds, None).rstrip()
    if others:
        calls, seconds, share = (
            sum(getattr(one, name) for one in others) for name in ("calls", "seconds", "share")
        )
        yield row(f"{len(others)} others", calls, seconds, share)
    if profile.clock == "host":
        rest = 1 - sum(one.share for one in profile.operations)
        yield row("between them", None, rest * profile.traced_step_s, rest)


def _indented(kernel: KernelTime) -> str:
    return f"  {kernel.kernel}"


def _under_roof(one: OperationShare) -> str:
    if one.roof is None:
        return ""
    return f"  {one.flops / 1e9:8.3f}  {one.bytes / 1e6:8.2f}  {one.roof:<8}  {one.roof_share:7.1%}"


def tool_lines(command: Sequence[str], folder: str | Path, profile: Profile) -> list[str]:
    """Return command lines of NVIDIA's profilers for the same steps, or why there are none.

    Args:
        command: what profiled the steps, without --under.
        folder: where their reports shall go.
        profile: of the steps; ncu looks at the kernel that takes longest.
    """
    lines = []
    for tool, options in (("nsys", _nsys(folder)), ("ncu", _ncu(folder, profile))):
        if shutil.which(tool) is None:
            lines.append(f"{tool}: not found on the PATH")
        elif profile.clock != "gpu":
            lines.append(f"{tool}: looks at a CUDA device, and these steps ran on {profile.device}")
        else:
            lines.append(shlex.join([tool, *options, *command, "--under", tool]))
    return lines


def _nsys(folder: str | Path) -> list[str]:
    captured = ("--capture-range=cudaProfilerApi", "--capture-range-end=stop")
    return ["profile", "--trace=cuda,nvtx", *captured, f"--output={Path(folder) / 'nsys'}"]


def _ncu(folder: str | Path, profile: Profile) -> list[str]:
    kernels = [kernel for one in profile.operations for kernel in one.kernels]
    longest = max(kernels, key=lambda kernel: kernel.seconds, default=None)
    # The function alone, without return type, namespaces and template arguments.
    name = [] if longest is None else ["--kernel-name", re.search(r"(\w+)\s*(?:[<(]|$)", longest.kernel)[1]]
    chosen = [*name, "--launch-count", "1", "--set", "full"]
    return ["--profile-from-start", "off", "--nvtx", *chosen, "--export", str(Path(folder) / "ncu")]
