"""`mgt-fast profile`: where the time of real steps of a tiny network goes, and how that is written."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from typer.testing import CliRunner

from mgt_fast import profiling
from mgt_fast.cli import app
from mgt_fast.train import profile as profiles
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.profile import KernelTime, OperationShare, Profile, RangeShare, profile_steps
from mgt_fast.train.profile_report import report, tool_lines

SETTINGS = [
    "model.channels=16",
    "model.num_scalars=8",
    "model.num_vectors=2",
    "model.num_blocks=1",
    "data.limit=12",
    "data.max_neighbors=8",
    "optim.batch_size=4",
    "threads=1",
    "device=cpu",
]
TARGET = "data.target=formation_energy_per_atom"
LAYERS = {
    "se3.atom_embedding",
    "se3.edge_embedding",
    "se3.angle_embedding",
    "se3.edges_layer.0",
    "se3.atoms_layer.0",
    "so3.atom_embedding",
    "so3.edge_embedding",
    "so3.equi_update.0",
    "so3.transconv.0",
}
STEP = {"data", "neighbours", "loss", "backward", "optimiser", "other"}
CONFIGS = {
    "pretrain": (load_config(PretrainConfig, None, SETTINGS), STEP | LAYERS | {"noise", "se3_angle_layer"}),
    "finetune": (
        load_config(FinetuneConfig, None, [*SETTINGS, TARGET]),
        STEP | LAYERS | {"mixture_of_experts"},
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def profiled(request, tmp_path_factory):
    """A profile, its folder, the ranges it should have, and the seconds that it took to make."""
    config, expected = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    start = time.perf_counter()
    found = profile_steps(config, folder, steps=4, warmup=1)  # into the second epoch
    return found, folder, expected, time.perf_counter() - start


def test_every_range_is_there(profiled):
    found, _, expected, _ = profiled
    ranges = {one.range: one for one in found.ranges}
    assert expected <= set(ranges)
    for layer in LAYERS:
        assert ranges[layer].forward_s > 0
        assert ranges[layer].backward_s > 0
    for name in ("data", "neighbours", "optimiser"):
        assert ranges[name].forward_s > 0
        assert ranges[name].backward_s == 0
    assert found.ranges[-1].range == "other"


def test_shares_add_up(profiled):
    found, _, _, seconds = profiled
    assert sum(one.share for one in found.ranges) == pytest.approx(1)
    assert sum(one.forward_s + one.backward_s for one in found.ranges) == pytest.approx(found.traced_step_s)
    assert found.steps == 4
    assert 4 * found.traced_step_s + 4 * found.step_s < seconds
    assert sum(one.share for one in found.operations) < 1
    assert found.clock == "host"
    assert found.host_ranges == ()


def test_operations_stand_under_roofs(profiled):
    found = profiled[0]
    assert len(found.operations) > 20
    for one in found.operations:
        assert one.calls > 0
        assert one.bytes > 0
        assert one.flops >= 0
        assert 0 < one.roof_share < math.inf
        assert one.roof in ("products", "memory")
    times = [one.seconds for one in found.operations]
    assert times == sorted(times, reverse=True)
    products = {one.operation: one for one in found.operations if one.flops}
    assert {"aten::mm", "aten::addmm"} <= set(products)


def test_what_is_counted_is_what_was_traced(profiled, monkeypatch):
    found, _, expected, _ = profiled
    config = CONFIGS["pretrain" if "noise" in expected else "finetune"][0]
    tallies = profiles._count(config, found.ceilings, steps=4, warmup=1)
    calls = {one.operation: one.calls for one in found.operations}
    for name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::silu", "aten::_fused_adamw"):
        assert calls[name] == tallies[name].calls / 4


def test_files(profiled):
    found, folder, _, _ = profiled
    assert json.loads((folder / "profile.json").read_text()) == json.loads(json.dumps(asdict(found)))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "mgt_fast/optimiser" for event in events) == 4


def test_steps_make_no_ranges_while_nothing_is_recorded(monkeypatch):
    made = []
    monkeypatch.setattr(profiling, "record_function", lambda *args: made.append(args))
    monkeypatch.setattr("nvtx.annotate", lambda *args, **kwargs: made.append(args))
    profiles._Steps(CONFIGS["pretrain"][0]).take(2)
    assert made == []


GPU = Profile(
    device="A GPU 9000",
    torch="2.0",
    precision="bf16",
    steps=2,
    step_s=0.01,
    traced_step_s=0.0125,
    clock="gpu",
    ceilings={"copy": 3e12, "bf16": 8e14},
    ranges=(RangeShare("layer.0", 0.003, 0.006, 0.72), RangeShare("idle", 0.0035, 0.0, 0.28)),
    host_ranges=(RangeShare("layer.0", 0.0125, 0.0, 1.0),),
    operations=(
        OperationShare(
            "aten::mm", 3.0, 0.008, 0.64, 4e12, 2e9, "products", 0.625,
            (KernelTime("void cutlass::gemm<float, 3>(int)", 2.0, 0.006), KernelTime("split", 1.0, 0.002)),
        ),
        OperationShare("search", 1.0, 0.001, 0.08, None, None, None, None, ()),
    ),
)  # fmt: skip
REPORT = """\
2 steps on A GPU 9000, bf16, torch 2.0: 10.00 ms a step, 12.50 ms while traced

share of the step by range, time on the GPU in ms
range      forward   backward   share
layer.0      3.000      6.000   72.0%
idle         3.500          -   28.0%
sum          6.500      6.000  100.0%

the same by the host's clock
range      forward   backward   share
layer.0     12.500          -  100.0%
sum         12.500          -  100.0%

operations a step, time on the GPU in ms, under the roofs: memory 3.00 TB/s, bf16 800.00 TFLOP/s
operation                             calls      time   share     GFLOP        MB  roof      of roof
aten::mm                                  3     8.000   64.0%  4000.000   2000.00  products    62.5%
  void cutlass::gemm<float, 3>(int)       2     6.000
  split                                   1     2.000
search                                    1     1.000    8.0%"""


def test_report():
    assert report(GPU) == REPORT


def test_long_tables_are_cut():
    one = GPU.operations[0]
    many = replace(GPU, operations=tuple(replace(one, operation=f"op{i}", kernels=()) for i in range(30)))
    lines = report(many).splitlines()
    assert lines[-1].split() == ["10", "others", "30", "80.000", "640.0%"]
    assert len(lines) == len(REPORT.splitlines()) - 4 + 21


def test_command_lines_of_tools_that_are_there(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    nsys, ncu = tool_lines(["mgt-fast", "profile", "--set", "a.b=[1, 2]"], "out", GPU)
    command = "mgt-fast profile --set 'a.b=[1, 2]' --under"
    assert nsys == (
        "nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi --capture-range-end=stop "
        f"--output=out/nsys {command} nsys"
    )
    assert ncu == (
        "ncu --profile-from-start off --nvtx --kernel-name gemm --launch-count 1 --set full --export out/ncu "
        f"{command} ncu"
    )
    on_cpu = tool_lines(["mgt-fast"], "out", replace(GPU, clock="host", device="cpu"))
    assert on_cpu == [
        f"{tool}: looks at a CUDA device, and these steps ran on cpu" for tool in ("nsys", "ncu")
    ]


def test_tools_that_are_not_there(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: None)
    assert tool_lines(["mgt-fast"], "out", GPU) == [
        "nsys: not found on the PATH",
        "ncu: not found on the PATH",
    ]


def invoke(*arguments):
    return CliRunner().invoke(
        app, ["profile", *(f"-s{setting}" for setting in SETTINGS), *map(str, arguments)]
    )


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda tool: None)
    result = invoke("--steps=1", "--warmup=1", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "profile.json").read_text())
    assert f"1 steps on {found['device']}" in result.output
    assert "se3.edges_layer.0" in result.output
    assert "of roof" in result.output
    assert "nsys: not found" in result.output
    again = invoke("--steps=1", "--warmup=1", "-o", tmp_path)
    assert again.exit_code == 1
    assert "already holds trace.json, profile.json" in again.stderr


def test_steps_for_nvidias_tools(monkeypatch):
    """Warm-up outside of the cudaProfiler range, steps inside, all of them with NVTX ranges."""
    events = []

    class Annotation(nullcontext):
        def __init__(self, name, domain):
            super().__init__()
            events.append(name)

    class Steps:
        device, model = torch.device("cuda"), torch.nn.Sequential(torch.nn.Identity())

        def __init__(self, config):
            pass

        def take(self, number):
            events.append(number)
            self.model(torch.ones(1))

    monkeypatch.setattr("nvtx.annotate", Annotation)
    monkeypatch.setattr(profiles, "_Steps", Steps)
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: events.append("start"))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: events.append("stop"))
    profiles.run_steps(CONFIGS["pretrain"][0], steps=7, warmup=3)
    assert events == [3, "0", "start", 7, "0", "stop"]


def test_nvidias_tools_need_a_gpu():
    result = invoke("--steps=1", "--warmup=1", "--under=nsys")
    assert result.exit_code == 1
    assert "on cpu" in result.stderr
