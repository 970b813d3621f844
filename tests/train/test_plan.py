import heapq
import time

import numpy as np
import pytest

from mgt_fast.data import CrystalDataset
from mgt_fast.data.counts import edge_counts
from mgt_fast.train.plan import BatchPlan, MemoryBudget, MemoryBudgetError, balance, batch_bounds, split_batch

EDGES = np.random.default_rng(0).integers(20, 2000, 1000)
CRYSTALS = np.arange(5000, 6000)


def plan(**options):
    return BatchPlan(CRYSTALS, EDGES, 64, **{"seed": 3, "smallest": 2, **options})


@pytest.mark.parametrize(
    ("n", "batch_size", "smallest", "expected"),
    [
        (10, 4, 1, [4, 3, 3]),
        (9, 4, 1, [3, 3, 3]),
        (8, 4, 1, [4, 4]),
        (3, 8, 1, [3]),
        (129, 128, 2, [65, 64]),
        (5, 2, 2, [3, 2]),
        (3, 2, 2, [3]),
        (2, 2, 2, [2]),
        (1, 2, 2, [1]),
    ],
)
def test_sizes_of_batches(n, batch_size, smallest, expected):
    assert np.diff(batch_bounds(n, batch_size, smallest)).tolist() == expected


def test_every_crystal_once_an_epoch_in_an_order_of_its_own():
    batches = plan()
    numbers = range(batches.num_batches)
    orders = [np.concatenate([batches.batch(epoch, i).crystals for i in numbers]) for epoch in (1, 2)]
    for order in orders:
        assert sorted(order.tolist()) == CRYSTALS.tolist()
    assert not np.array_equal(*orders)
    again = plan()
    assert np.array_equal(again.batch(2, 7).crystals, batches.batch(2, 7).crystals)
    assert not np.array_equal(plan(seed=4).batch(2, 7).crystals, batches.batch(2, 7).crystals)
    unshuffled = plan(seed=None)
    assert np.array_equal(np.concatenate([unshuffled.batch(1, i).crystals for i in numbers]), CRYSTALS)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_share_a_batch_at_equal_cost(num_ranks):
    batches, single = plan(num_ranks=num_ranks), plan()
    for number in range(batches.num_batches):
        split = batches.batch(1, number)
        assert np.array_equal(split.crystals, single.batch(1, number).crystals)
        places = np.concatenate([chunk for share in split.shares for chunk in share])
        assert sorted(places.tolist()) == list(range(len(split.crystals)))
        costs = [EDGES[split.crystals[share[0]] - 5000].sum() for share in split.shares]
        assert max(costs) < 1.05 * min(costs)
        assert not split.chunked
        assert not split.recompute


def test_memory_decides_the_path():
    edges = EDGES[:64]
    total = int(edges.sum())
    budget = MemoryBudget(limit=total, bytes_per_edge=1, recomputed_bytes_per_edge=0.25)
    shares, recompute = split_batch(edges, 1, budget)
    assert (len(shares[0]), recompute) == (1, False)
    tighter = MemoryBudget(total / 3, 1, 0.25)
    assert split_batch(edges, 1, tighter)[1]
    assert not split_batch(edges, 4, tighter)[1]
    tightest = MemoryBudget(total / 9, 1, 0.25)
    for num_ranks in (1, 2):
        shares, recompute = split_batch(edges, num_ranks, tightest)
        assert not recompute
        assert all(edges[chunk].sum() <= total / 9 for share in shares for chunk in share)
        assert sum(len(share) for share in shares) <= 12
        places = np.concatenate([chunk for share in shares for chunk in share])
        assert sorted(places.tolist()) == list(range(64))


def test_no_chunk_exceeds_the_budget_even_if_items_pack_badly():
    edges = np.array([6, 6, 6, 4, 4])
    shares, _ = split_batch(edges, 1, MemoryBudget(9, 1, 1))
    assert sorted(int(edges[chunk].sum()) for chunk in shares[0]) == [4, 4, 6, 6, 6] or all(
        edges[chunk].sum() <= 9 for chunk in shares[0]
    )


def test_a_crystal_over_the_budget_is_named():
    names = {5000 + int(EDGES.argmax()): "quartz"}
    budget = MemoryBudget(1000 * 2.0**20, 2.0**21, 2.0**20)
    with pytest.raises(MemoryBudgetError, match=r"crystal 'quartz' has \d+ edges.* 0\.977 GiB; set a"):
        plan(budget=budget, names=names)


def test_a_crystal_that_fits_only_recomputed_is_recomputed():
    budget = MemoryBudget(limit=100, bytes_per_edge=1, recomputed_bytes_per_edge=0.5)
    shares, recompute = split_batch(np.array([150, 20, 60, 60]), 1, budget)
    assert recompute
    assert sorted(len(chunk) for chunk in shares[0]) == [1, 3] or len(shares[0]) == 2
    BatchPlan(np.arange(4), np.array([150, 20, 60, 60]), 4, budget=budget)


def test_every_rank_needs_a_crystal():
    with pytest.raises(ValueError, match="some batch has 62, and 63 ranks need a crystal each; start fewer"):
        plan(num_ranks=63)


@pytest.mark.parametrize("parts", [1, 2, 5, 40])
def test_balance(parts):
    costs = EDGES[:40]
    members = balance(costs, parts)
    assert sorted(np.concatenate(members).tolist()) == list(range(40))
    assert all(len(part) for part in members)
    loads = [costs[part].sum() for part in members]
    assert max(loads) <= max(4 / 3 * costs.sum() / parts, costs.max())
    free = balance(np.zeros(6, int), 3)  # crystals without edges are spread as well
    assert [len(part) for part in free] == [2, 2, 2]


@pytest.fixture(scope="module")
def real_edges():
    return edge_counts(CrystalDataset.open(), 25)


def dealt_one_by_one(costs, parts):
    """Largest load of Graham's rule, each item to the cheapest part."""
    loads = [0] * parts
    for cost in sorted(costs.tolist(), reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def divided(costs, parts):
    """Loads of a division that has every item once."""
    members = balance(costs, parts)
    assert len(members) == parts
    assert np.array_equal(np.sort(np.concatenate(members)), np.arange(len(costs)))
    assert all((np.diff(part) > 0).all() for part in members)
    assert all(len(part) for part in members) or len(costs) < parts
    return np.array([costs[part].sum() for part in members])


@pytest.mark.parametrize(
    ("size", "parts"), [(64, 2), (64, 8), (1024, 8), (1024, 128), (4096, 1000), (65536, 8)]
)
def test_real_crystals_are_divided_as_well_as_one_by_one(real_edges, size, parts):
    for seed in range(3):
        costs = np.random.default_rng(seed).choice(real_edges, size)
        assert divided(costs, parts).max() <= 1.02 * dealt_one_by_one(costs, parts)


@pytest.mark.parametrize("parts", [2, 3, 8, 100, 999, 1500])
@pytest.mark.parametrize("size", [1, 7, 1000, 2999])
def test_bound_of_balance(size, parts):
    random = np.random.default_rng(size)
    cases = (
        random.integers(0, 4000, size),
        (20 * random.pareto(0.8, size)).astype(np.int64),
        np.where(np.arange(size) == size // 2, 10**6, 1),
        np.where(np.arange(size) < parts - 1, 10**6, 1),
        10**6 // (1 + np.arange(size)),
        2 ** (np.arange(size) % 31),
        np.zeros(size, np.int64),
    )
    for costs in cases:
        assert divided(costs, parts).max() <= 4 / 3 * np.maximum(costs, 1).sum() / parts + 2 * costs.max() + 1


def test_a_large_batch_is_planned_at_once(real_edges):
    costs = np.random.default_rng(0).choice(real_edges, 65536)
    budget = MemoryBudget(limit=max(costs.sum() / 24, 4008), bytes_per_edge=1, recomputed_bytes_per_edge=1)

    def fastest(plan):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            plan()
            times.append(time.perf_counter() - start)
        return min(times)

    one_by_one = fastest(lambda: dealt_one_by_one(costs, 1000))
    assert fastest(lambda: split_batch(costs, 8, None)) < one_by_one / 3
    assert fastest(lambda: split_batch(costs, 1000, None)) < one_by_one
    assert fastest(lambda: split_batch(costs, 8, budget)) < one_by_one


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_chunks_are_few_and_every_rank_has_one(real_edges, num_ranks):
    edges = np.random.default_rng(1).choice(real_edges, 500)
    packing_badly = np.full(200, 51)
    for costs, limit, most in ((edges, 5000, edges.sum() / 5000 * 1.1 + 1), (packing_badly, 100, 212)):
        shares, _ = split_batch(costs, num_ranks, MemoryBudget(limit, 1, 1))
        assert all(share for share in shares)
        assert all(len(chunk) and costs[chunk].sum() <= limit for share in shares for chunk in share)
        chunks = [chunk for share in shares for chunk in share]
        assert len(chunks) <= most
        assert np.array_equal(np.sort(np.concatenate(chunks)), np.arange(len(costs)))
        loads = [sum(costs[chunk].sum() for chunk in share) for share in shares]
        assert max(loads) - min(loads) <= limit
