import math
from dataclasses import replace

import pytest
import torch

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph, losses
from mgt_fast.data import CrystalDataset
from mgt_fast.layers import GraphIndex
from mgt_fast.losses import (
    denoising_losses,
    draw_noise,
    noise_per_crystal,
    nt_xent,
    nt_xent_gradient,
    nt_xent_part,
    pretraining_loss,
)
from mgt_fast.outputs import EdgeNoise, MGTOutput


@pytest.fixture(scope="module")
def graph():
    crystals = CrystalBatch.from_arrays(
        [14, 14, 29],
        [[0, 0, 0], [0.25, 0.25, 0.27], [0, 0, 0]],
        [[[0, 2.7, 2.7], [2.7, 0, 2.7], [2.7, 2.7, 0]], [[2.5, 0, 0], [0, 2.6, 0], [0, 0, 2.7]]],
        [2, 1],
    )
    return build_graph(crystals, max_neighbors=6)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_nt_xent_matches_a_loop(batch, temperature):
    torch.manual_seed(batch)
    a, b = torch.randn(2, batch, 4, dtype=torch.float64)
    views, total = [*a, *b], 0.0
    for i, anchor in enumerate(views):
        similar = {
            j: math.exp(float(torch.cosine_similarity(anchor, other, dim=0)) / temperature)
            for j, other in enumerate(views)
            if j != i
        }
        total -= math.log(similar[(i + batch) % (2 * batch)] / sum(similar.values()))
    assert float(nt_xent(a, b, temperature)) == pytest.approx(total / (2 * batch), rel=1e-12, abs=1e-14)


def test_nt_xent_refuses_views_of_different_batches():
    with pytest.raises(ValueError, match="differ in shape"):
        nt_xent(torch.zeros(2, 4), torch.zeros(3, 4))


def test_noise_is_fresh_unless_keys_decide_it(graph):
    assert not torch.equal(draw_noise(graph, 0.05).vector, draw_noise(graph, 0.05).vector)
    first, again, other = (draw_noise(graph, 0.05, torch.tensor(keys)) for keys in ([5, 6], [5, 6], [7, 8]))
    assert torch.equal(first.cosine, again.cosine)
    assert torch.equal(first.vector, again.vector)
    both = torch.cat([first.cosine, first.vector, other.cosine, other.vector])
    assert len(both.unique()) == both.numel()
    assert both.std() == pytest.approx(0.05, rel=0.2)


def test_noise_of_a_crystal_does_not_depend_on_its_batch():
    def noise_of(places):
        return draw_noise(build_graph(dataset.gather(places), 6), 0.05, torch.tensor(places) + 40).vector

    dataset = CrystalDataset.open()
    apart = torch.cat([noise_of([place]) for place in (3, 0, 7)])
    assert torch.equal(noise_of([3, 0, 7]), apart)


@pytest.mark.parametrize("similarities", [1, 3 * 14, 2**26])
def test_gradient_of_nt_xent_in_blocks(monkeypatch, similarities):
    monkeypatch.setattr(losses, "SIMILARITIES", similarities)
    z = torch.randn(
        2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True
    )
    loss, gradient = nt_xent_gradient(*z, 0.5)
    expected = nt_xent(*z, 0.5)
    torch.testing.assert_close(nt_xent_part(*z, 0.5), expected.detach())
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])


def test_crystal_target_is_a_mean_over_atoms_of_means_over_incoming_edges(graph):
    noise = torch.randn(graph.num_edges, 3, dtype=torch.float64)
    expected = []
    for b in range(2):
        atoms = range(int(graph.batch_ptr[b]), int(graph.batch_ptr[b + 1]))
        expected.append(torch.stack([noise[graph.edge_index[1] == i].mean(0) for i in atoms]).mean(0))
    torch.testing.assert_close(noise_per_crystal(noise, GraphIndex(graph)), torch.stack(expected))


@pytest.mark.parametrize("denoising", ["crystal", "edge"])
def test_loss_parts(graph, denoising):
    noise = EdgeNoise(*torch.full((2, graph.num_edges, 3), 0.1, dtype=torch.float64))
    shape = (2, 3) if denoising == "crystal" else (graph.num_edges, 3)
    z = torch.randn(2, 4, dtype=torch.float64)
    output = MGTOutput(
        se3_proj=z,
        so3_proj=z,
        se3_noise=torch.full(shape, 0.1).double(),
        so3_noise=torch.zeros(shape).double(),
    )
    found = pretraining_loss(output, graph, noise, denoising=denoising, noise_std=0.05, weights=(2, 3, 5))
    assert float(found.se3_denoising) == pytest.approx(0, abs=1e-12)
    # Wrong by 0.1 in three components: a sum over two crystals, or a mean in units of 0.05.
    assert float(found.so3_denoising) == pytest.approx(0.06 if denoising == "crystal" else 12)
    assert float(found.total) == pytest.approx(2 * float(nt_xent(z, z)) + 5 * float(found.so3_denoising))


@pytest.mark.parametrize("count", [3, 20])
def test_parts_of_nt_xent_add_up(monkeypatch, count):
    monkeypatch.setattr(losses, "SIMILARITIES", 2 * 14)
    z = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)
    parts = [nt_xent_gradient(*z, 0.5, part=part, parts=count) for part in range(count)]
    alone = [nt_xent_part(*z, 0.5, part=part, parts=count) for part in range(count)]
    assert not any(loss.requires_grad for loss in alone)
    torch.testing.assert_close(torch.stack(alone), torch.stack([loss for loss, _ in parts]))
    for found, expected in zip(map(sum, zip(*parts, strict=True)), nt_xent_gradient(*z, 0.5), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("denoising", ["crystal", "edge"])
def test_denoising_losses_of_parts_add_up(denoising):
    dataset = CrystalDataset.open()

    def losses_of(places, num_edges):
        graph = build_graph(dataset.gather(places), 6)
        noise = draw_noise(graph, 0.05, torch.tensor(places))
        rows = len(places) if denoising == "crystal" else graph.num_edges
        output = MGTOutput(se3_noise=torch.ones(rows, 3).double(), so3_noise=torch.zeros(rows, 3).double())
        return torch.stack(
            denoising_losses(output, graph, noise, denoising=denoising, noise_std=0.05, num_edges=num_edges)
        )

    total = build_graph(dataset.gather([3, 0, 7]), 6).num_edges
    torch.testing.assert_close(losses_of([3, 0], total) + losses_of([7], total), losses_of([3, 0, 7], None))


def test_heads_of_the_other_kind_are_refused(graph):
    noise = draw_noise(graph, 0.05)
    per_crystal = MGTOutput(se3_noise=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"targets of shape \(\d+, 3\), but the network predicts \(2, 3\)"):
        pretraining_loss(per_crystal, graph, noise, denoising="edge")
    with pytest.raises(ValueError, match="denoising = 'edges'; choose crystal or edge"):
        pretraining_loss(per_crystal, graph, noise, denoising="edges")


def test_one_view_has_no_contrast(graph):
    noise = draw_noise(graph, 0.05)
    output = MGTOutput(se3_proj=torch.zeros(2, 4), se3_noise=torch.zeros(2, 3))
    found = pretraining_loss(output, graph, noise)
    assert found.contrastive is None
    assert found.so3_denoising is None
    torch.testing.assert_close(found.total, 0.5 * found.se3_denoising)


def test_narrow_embeddings_are_compared_in_float32():
    a, b = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = nt_xent(a, b)
    assert torch.equal(narrow, nt_xent(a.float(), b.float()))


@pytest.mark.parametrize("denoising", ["crystal", "edge"])
def test_edges_are_sorted_by_target_once_a_step(graph, monkeypatch, denoising):
    sorts, sort = [], torch.Tensor.sort

    def counting(tensor, *args, **options):
        sorts.append(tensor)
        return sort(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "sort", counting)
    network = MGT(MGTConfig(task="pretrain", denoising=denoising, channels=16, num_blocks=1)).double()
    noise = draw_noise(graph, 0.05, torch.arange(2))
    assert sorts == []
    output = network(graph, noise)
    loss = pretraining_loss(output, graph, noise, denoising=denoising, noise_std=0.05)
    loss.total.backward()
    assert sum(torch.equal(values, graph.edge_index[1]) for values in sorts) == 1
    assert "index" not in repr(output)
    without = pretraining_loss(replace(output, index=None), graph, noise, denoising=denoising, noise_std=0.05)
    assert torch.equal(loss.total, without.total)
