import numpy as np
import pytest
import torch

from mgt_fast.data import CrystalDataset
from mgt_fast.data.counts import edge_counts
from mgt_fast.distributed import Ranks
from mgt_fast.train.feed import BatchFeed, GraphSource
from mgt_fast.train.plan import BatchPlan, MemoryBudget

CHOSEN = np.arange(40, 60)


@pytest.fixture(scope="module")
def dataset():
    return CrystalDataset.open()


@pytest.fixture(scope="module")
def edges(dataset):
    return edge_counts(dataset, 6)[CHOSEN]


def feed(dataset, edges, rank=0, num_ranks=1, **options):
    ranks = Ranks.alone()
    ranks.rank, ranks.size = rank, num_ranks
    plan = BatchPlan(CHOSEN, edges, 8, num_ranks=num_ranks, **{"seed": 5, **options})
    return BatchFeed(GraphSource(dataset, 6, None, torch.device("cpu")), plan, ranks, 5, 2)


def test_ranks_get_disjoint_parts_of_the_same_batches(dataset, edges):
    whole = list(feed(dataset, edges).batches(1))
    parts = [list(feed(dataset, edges, rank, 3).batches(1)) for rank in range(3)]
    assert [batch.size for batch in whole] == [7, 7, 6]
    for number, batch in enumerate(whole):
        (chunk,) = batch.chunks
        shares = [part[number].chunks[0] for part in parts]
        places = torch.cat([share.places for share in shares])
        assert sorted(places.tolist()) == list(range(batch.size))
        for share in shares:
            assert np.array_equal(share.crystals, chunk.crystals[share.places.numpy()])
            assert torch.equal(share.keys, chunk.keys[share.places])  # the same noise on whichever rank
            assert share.graph.ids == tuple(dataset.ids[i] for i in share.crystals)
        assert all(part[number].num_edges == batch.num_edges == chunk.graph.num_edges for part in parts)


def test_an_epoch_can_begin_in_its_middle(dataset, edges):
    def seen(first):
        return [(b.number, b.chunks[0].crystals.tolist()) for b in feed(dataset, edges).batches(2, first)]

    assert seen(0)[1:] == seen(1)
    assert seen(3) == []


def test_noise_is_of_the_epoch_and_the_purpose(dataset, edges):
    one = feed(dataset, edges, seed=None)
    other = BatchFeed(one.source, one.plan, one.ranks, 5, purpose=3)
    keys = [next(some.batches(epoch)).chunks[0].keys for some, epoch in ((one, 1), (one, 2), (other, 1))]
    assert len(torch.cat(keys).unique()) == 3 * len(keys[0])


def test_chunks_keep_to_the_budget(dataset, edges):
    budget = MemoryBudget(1.2 * edges.max(), 1, 1)
    batches = list(feed(dataset, edges, budget=budget).batches(1))
    assert any(batch.chunked for batch in batches)
    for batch in batches:
        assert all(chunk.graph.num_edges <= budget.limit for chunk in batch.chunks)
        assert sum(chunk.graph.num_edges for chunk in batch.chunks) == batch.num_edges


def test_graphs_are_made_for_the_device_of_the_network(dataset, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "mgt_fast.train.feed.network_input",
        lambda crystals, *where, **how: asked.append((tuple(crystals.ids), where, how)),
    )
    monkeypatch.setattr("mgt_fast.structures.CrystalBatch.pin_memory", lambda crystals: crystals)
    device = torch.device("cuda", 1)
    GraphSource(dataset, max_neighbors=6, compat="comformer", device=device).graph(np.array([3]))
    name = dataset.ids[3]
    options = {"max_neighbors": 6, "compat": "comformer", "shell_tolerance": 1e-4, "num_edges": None}
    assert asked == [((name,), (device,), options)]
