"""What `bytes_per_edge` counts beside what torch's allocator hands out in a training step."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph, memory
from mgt_fast.losses import draw_noise
from mgt_fast.memory import bytes_per_edge, cgroup_limits, memory_limit

ATOMS = 16


def config(**changes):
    return MGTConfig(**({"task": "pretrain", "channels": 64, "dropout": 0.0} | changes))


def disorder(num_crystals):
    """Atoms at random, of which no two lengths or angles are equal."""
    atoms = ATOMS * num_crystals
    frac = np.random.default_rng(0).random((atoms, 3))
    cells = np.tile(6 * np.eye(3), (num_crystals, 1, 1))
    batch = CrystalBatch.from_arrays(np.full(atoms, 14), frac, cells, [ATOMS] * num_crystals)
    return build_graph(batch, max_neighbors=25).to(dtype=torch.float32)


def peak(step):
    """Most bytes that tensors made by `step` hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in changes]).max())


def measured(sizes, recompute, precision):
    """Growth of a step's peak by edge, so that parameters and their gradients do not count."""
    torch.manual_seed(0)
    model, peaks = MGT(sizes, backend="torch"), []
    model.recompute = recompute
    for graph in map(disorder, (2, 8)):
        noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))

        def step(graph=graph, noise=noise):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = model(graph, noise)
            names = ("se3_proj", "so3_proj", "se3_noise", "so3_noise")
            values = [getattr(out, name) for name in names]
            sum(value.float().square().sum() for value in values if value is not None).backward()
            model.zero_grad()

        peaks.append((graph.num_edges, peak(step)))
    (few, low), (many, high) = peaks
    return (high - low) / (many - few)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "float32"),
        ({}, "bf16"),
        ({"views": "se3", "num_blocks": 3}, "float32"),
        ({"views": "so3", "num_scalars": 16}, "float32"),
        ({"denoising": "edge"}, "float32"),
    ],
    ids=str,
)
def test_counts_lie_above_measurements_and_not_far(changes, precision, recompute):
    sizes = config(**changes)
    ratio = bytes_per_edge(sizes, "torch", precision, recompute) / measured(sizes, recompute, precision)
    assert 1 <= ratio <= 1.5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_computing_again_takes_less(backend):
    kept, again = (bytes_per_edge(config(), backend, "float32", recompute) for recompute in (False, True))
    assert again < 0.8 * kept
    deep = [
        bytes_per_edge(config(num_blocks=8), backend, "float32", recompute) for recompute in (False, True)
    ]
    assert deep[1] < 0.4 * deep[0]


def process(folder, groups, mounts, limits):
    """A process's folder in /proc, and the files of its control groups."""
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    lines = [f"30 23 0:2{i} {line.format(folder)}\n" for i, line in enumerate(mounts)]
    (folder / "mountinfo").write_text("22 1 0:20 / / rw - ext4 /dev/sda rw\n" + "".join(lines))
    for name, text in limits.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    return folder


V1 = "{} {{0}}/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
V2 = "{} {{0}}/unified rw - cgroup2 cgroup2 rw,nsdelegate"


@pytest.mark.parametrize(
    ("groups", "mounts", "limits", "expected"),
    [
        (  # a batch job: the limit stands on the job, above the step
            ["0::/slurm/job_7/step_0"],
            [V2.format("/")],
            {
                "unified/slurm/job_7/memory.max": 3000,
                "unified/slurm/job_7/step_0/memory.max": "max",
                "unified/slurm/job_8/memory.max": 10,
            },
            [3000],
        ),
        (  # a container that sees its own group alone, under the name that its host has for it
            ["5:cpu:/docker/a", "4:hugetlb,memory:/docker/a/b"],
            [V1.format("/docker/a"), V1.format("/").replace("memory", "cpu")],
            {"memory/memory.limit_in_bytes": 9000, "memory/b/memory.limit_in_bytes": 7000},
            [9000, 7000],
        ),
        (  # a namespace of its own, entered from outside
            ["0::/../../elsewhere"],
            [V2.format("/")],
            {"unified/memory.max": 500},
            [500],
        ),
        (  # both versions; memory belongs to the first
            ["4:memory:/x", "0::/"],
            [V1.format("/"), V2.format("/")],
            {"memory/x/memory.limit_in_bytes": 200, "memory/memory.limit_in_bytes": 2**63 - 4096},
            [2**63 - 4096, 200],
        ),
        (["0::/"], [V2.format("/")], {}, []),
    ],
    ids=["job", "container", "outside", "both", "unlimited"],
)
def test_limits_of_control_groups_are_found(tmp_path, groups, mounts, limits, expected):
    assert list(cgroup_limits(process(tmp_path, groups, mounts, limits))) == expected


def test_a_system_without_control_groups_has_no_limits(tmp_path):
    assert list(cgroup_limits(tmp_path)) == []


def test_the_smallest_limit_is_shared_by_a_machine_s_ranks(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "cgroup_limits", lambda: iter(()))
    whole = memory_limit(cpu)
    assert whole > 2**20
    monkeypatch.setattr(memory, "cgroup_limits", lambda: iter((2**63 - 4096, 4 * 2**20, 8 * 2**20)))
    assert memory_limit(cpu) == 2 * 2**20
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_limit(cpu) == 2**19
