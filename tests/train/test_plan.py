import numpy as np
import pytest

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
