"""The data path: order of the crystals, gather, counts, noise; and its share of a training step.

A batch is 128 crystals of a made-up dataset of 200,000 with ten atoms each, drawn at random. Answers are
compared before anything is timed: gathered crystals with the samples of the DataLoader, orders with what a
permutation must be, counts with the graphs.
"""

from __future__ import annotations

import itertools
import time
from functools import partial

import numpy as np
import pairs
import pytest
import stores
import torch
from graphs import bundled_crystals, real_graph
from machine import affordable_rounds, clock, device
from rivals import Rival, Runner

from mgt_fast import build_graph
from mgt_fast.data.counts import count_edges
from mgt_fast.data.resident import ResidentCrystals
from mgt_fast.data.sampling import permuted
from mgt_fast.graph import network_input
from mgt_fast.losses import draw_noise
from mgt_fast.outputs import EdgeNoise

BATCH = 128
CRYSTALS = 200_000
SHARDS = {"one_shard": CRYSTALS, "49_shards": 4096}  # crystals a shard
ORDERED = 1_000_000
MAX_NEIGHBORS = 25
PAIR_SECONDS = 1.0
CRYSTALS_PER_CORE_SECOND = 300_000  # the goal of the gather
SHARE_OF_STEP = 0.1  # the goal of the whole data path
FAST = pytest.param(stores.ours, marks=pytest.mark.fast)


@pytest.fixture(scope="session")
def dataset(request, tmp_path_factory):
    """Return a function that writes the made-up crystals once for each size of shards."""
    small = request.config.getoption("smoke")
    folder, written = tmp_path_factory.mktemp("stores"), {}

    def write(shards):
        if shards not in written:
            count = CRYSTALS // 1000 if small else CRYSTALS
            size = SHARDS[shards] // (1000 if small else 1)
            written[shards] = stores.write_dataset(folder / shards, count, size)
        return written[shards]

    return write


def named(value):
    return getattr(value, "__name__", str(value))


def batches(count, of=BATCH):
    """Random batches, drawn beforehand and again and again."""
    rng = np.random.default_rng(0)
    return itertools.cycle([rng.integers(0, count, of) for _ in range(200)])


def reader(store, path):
    """Return a function that reads the next batch, once the store has been compared with the samples."""
    read, samples = store(path), stores.Samples(path)
    order = batches(len(samples))
    chosen = next(order)
    for found, expected in zip(read(chosen), stores.packed([samples[n] for n in chosen]), strict=True):
        assert torch.equal(found, expected)
    return lambda: read(next(order))


@pytest.mark.parametrize("store", [FAST, *stores.RIVALS], ids=named)
@pytest.mark.parametrize("shards", SHARDS)
def bench_gather(benchmark, dataset, shards, store):
    benchmark.group = f"gather of {BATCH} random crystals, {shards.replace('_', ' ')}"
    path = dataset(shards)
    run = reader(store, path)
    benchmark(run)
    if benchmark.stats:
        rate = BATCH / core_seconds(run)
        benchmark.extra_info["crystals_per_core_s"] = rate
        benchmark.extra_info["crystals_per_s"] = BATCH / benchmark.stats["median"]
        if store is stores.ours:
            benchmark.extra_info["goals"] = {"crystals_per_core_s": [rate, CRYSTALS_PER_CORE_SECOND, None]}
    if store is stores.ours:
        name = benchmark.name.replace("ours", "data_loader")
        pairs.against(benchmark, name, run, partial(reader, stores.data_loader, path), PAIR_SECONDS)


def core_seconds(run, repeats=200):
    """Processor seconds of a call, those of every thread."""
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


def resident(crystals, indices):
    """Crystals that lie on the device."""
    held, order = (
        ResidentCrystals(crystals, device()),
        itertools.cycle(torch.from_numpy(indices).to(device())),
    )
    return lambda: held.gather(next(order))


def copied(crystals, indices):
    """Crystals gathered on the host and copied."""
    order = itertools.cycle(indices)
    return lambda: crystals.gather(next(order)).to(device())


@pytest.fixture
def on_gpu(request):
    """Where there is no GPU nothing need be copied; a smoke test sees that it runs."""
    if device().type == "cpu" and not request.config.getoption("smoke"):
        pytest.skip("needs a GPU")


@pytest.mark.benchmark(timer=clock)
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("place", [pytest.param(resident, marks=pytest.mark.fast), copied], ids=named)
def bench_resident(benchmark, place):
    """Bundled crystals on the device's own memory beside copies of what the host gathers."""
    benchmark.group = f"gather of {BATCH} bundled crystals to {device().type}"
    crystals, order = bundled_crystals()
    indices = np.resize(order, (20, BATCH))
    run, other = place(crystals, indices), copied(crystals, indices)
    for _ in range(3):
        found, expected = run(), other()
        for name in ("numbers", "frac_coords", "cell", "batch_ptr", "pbc"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
    benchmark(run)
    if benchmark.stats:
        benchmark.extra_info["crystals_per_s"] = BATCH / benchmark.stats["median"]
    if place is resident:
        rival = partial(copied, crystals, indices)
        pairs.against(benchmark, "bench_resident[copied]", run, rival, PAIR_SECONDS)


# How the order of an epoch is drawn; each takes n and returns a function of the positions and the epoch.


def ours(n):
    return lambda positions, epoch: permuted(positions, n, epoch)


def numpy_table(n):
    return lambda positions, epoch: np.random.default_rng(epoch).permutation(n)[positions]


def torch_table(n):
    return lambda positions, epoch: torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).numpy()[
        positions
    ]


def ordered(draw, n, count):
    """Return a function that draws `count` positions of the next epoch's order, once it permutes."""
    order, epochs = draw(n), itertools.count()
    assert np.array_equal(np.sort(order(np.arange(n), 0)), np.arange(n))
    positions = np.arange(count)
    assert np.array_equal(order(positions, 1), order(np.arange(n), 1)[:count])
    return lambda: order(positions, next(epochs))


@pytest.mark.parametrize(
    "draw", [pytest.param(ours, marks=pytest.mark.fast), numpy_table, torch_table], ids=named
)
@pytest.mark.parametrize("count", [BATCH, ORDERED], ids=["a_batch", "all"])
def bench_order(benchmark, request, count, draw):
    """Positions of a new epoch: a table is drawn whole, a function only where it is asked."""
    n = ORDERED // 1000 if request.config.getoption("smoke") else ORDERED
    count = min(count, n)
    benchmark.group = f"order of {n} crystals: {count} positions"
    run = ordered(draw, n, count)
    benchmark(run)
    if draw is ours:
        name = benchmark.name.replace("ours", "numpy_table")
        pairs.against(benchmark, name, run, partial(ordered, numpy_table, n, count), PAIR_SECONDS)


def counted(crystals):
    """Our own counts."""
    return count_edges(crystals, MAX_NEIGHBORS)


def graphs_built(crystals):
    """Edges of graphs that are built whole, a batch at a time."""
    parts = []
    for start in range(0, len(crystals), 2 * BATCH):
        batch = crystals.gather(np.arange(start, min(start + 2 * BATCH, len(crystals))))
        graph = build_graph(batch, MAX_NEIGHBORS)
        parts.append(graph.row_ptr[graph.batch_ptr].diff().numpy())
    return np.concatenate(parts)


@pytest.mark.parametrize("count", [pytest.param(counted, marks=pytest.mark.fast), graphs_built], ids=named)
def bench_counts(benchmark, count):
    crystals, _ = bundled_crystals()
    benchmark.group = f"edges of {len(crystals)} bundled crystals, {MAX_NEIGHBORS} neighbours"
    assert np.array_equal(benchmark(count, crystals), graphs_built(crystals))
    if benchmark.stats:
        benchmark.extra_info["crystals_per_s"] = len(crystals) / benchmark.stats["median"]
    if count is counted:
        rival = partial(graphs_built, crystals)
        pairs.against(
            benchmark, "bench_counts[graphs_built]", partial(counted, crystals), lambda: rival, PAIR_SECONDS
        )


def keyed(graph):
    """Our noise, a function of each crystal's key."""
    keys = torch.arange(graph.num_crystals, device=device())
    return lambda: draw_noise(graph, 1.0, keys)


def randn(graph):
    """Torch's generator, whose numbers depend on what was drawn before."""
    generator = torch.Generator(device=device()).manual_seed(0)

    def draw():
        cosine, vector = torch.randn(2, graph.num_edges, 3, generator=generator, device=device())
        return EdgeNoise(cosine=cosine, vector=vector)

    return draw


def normal_numbers(draw, graph):
    """Return a function that draws noise, once it looks normal."""
    run = draw(graph)
    for numbers in vars(run()).values():
        assert numbers.shape == (graph.num_edges, 3)
        deviation = 5 / numbers.numel() ** 0.5
        assert abs(float(numbers.mean())) < deviation
        assert abs(float(numbers.square().mean()) - 1) < 2 * deviation
        assert abs(float(numbers.pow(3).mean())) < 4 * deviation
    return run


@pytest.mark.benchmark(timer=clock)
@pytest.mark.parametrize("draw", [pytest.param(keyed, marks=pytest.mark.fast), randn], ids=named)
def bench_noise(benchmark, draw):
    graph = real_graph(num_crystals=BATCH)
    benchmark.group = f"noise of {BATCH} bundled crystals"
    run = normal_numbers(draw, graph)
    benchmark(run)
    if benchmark.stats:
        benchmark.extra_info["ns_an_edge"] = 1e9 * benchmark.stats["median"] / graph.num_edges
    if draw is keyed:
        rival = partial(normal_numbers, randn, graph)
        pairs.against(benchmark, "bench_noise[randn]", run, rival, PAIR_SECONDS)


@pytest.mark.fast
@pytest.mark.benchmark(timer=clock)
def bench_share_of_step(benchmark, request):
    """Order, gather, neighbour list, graph and noise of a batch, timed in turns with its training step."""
    small, gpu = request.config.getoption("smoke"), torch.cuda.is_available()
    size, channels = (2, 16) if small else (512 if gpu else 16, 256)
    rival = Rival("triton", "bf16") if gpu else Rival("torch")
    benchmark.group = f"data path of {size} bundled crystals, of a training step with C = {channels}"
    crystals, _ = bundled_crystals()
    source = ResidentCrystals(crystals, device()) if gpu else crystals
    positions = torch.arange(size, device=device())
    epochs = itertools.count()

    def data_path():
        epoch = next(epochs)
        indices = permuted(positions if gpu else positions.numpy(), len(crystals), epoch)
        graph = network_input(source.gather(indices), device(), max_neighbors=MAX_NEIGHBORS, compat=None)
        return graph, draw_noise(graph, 0.05, torch.as_tensor(indices))

    graph, noise = data_path()
    assert noise.vector.shape == graph.edge_vec.shape == (graph.num_edges, 3)
    runner = Runner(rival, channels, "training step")
    with runner.precision():
        step = runner.step(real_graph(num_crystals=size))
        benchmark.pedantic(data_path, rounds=1 if small else affordable_rounds(data_path, PAIR_SECONDS))
        if benchmark.enabled:
            share = 1 / pairs.ratio_in_turns(data_path, step, PAIR_SECONDS)["ratio"]
            benchmark.extra_info["share_of_step"] = share
            benchmark.extra_info["goals"] = {"share_of_step": [share, None, SHARE_OF_STEP]}
