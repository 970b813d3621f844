from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from e3nn import o3
from parity import GOLDEN, TASKS, fixture_graph
from safetensors.torch import load_file

from mgt_fast.config import MGTConfig
from mgt_fast.outputs import EdgeNoise
from mgt_fast.reference import (
    MixtureOfExperts,
    ReferenceMGT,
    crystal_mean_noise,
    edge_frame_cosines,
    reference_nt_xent,
    reference_pretraining_loss,
)

SMALL = MGTConfig(channels=16, num_scalars=8, num_vectors=3, expert_hidden=12, output_dim=2, dropout=0.0)


@pytest.fixture(scope="module")
def crystals():
    graph, noise, _ = fixture_graph(load_file(GOLDEN))
    return graph, noise


def small_model(**changes):
    torch.manual_seed(0)
    return ReferenceMGT(replace(SMALL, **changes)).double().eval()


def random_rotation(seed, det):
    torch.manual_seed(seed)
    q = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    return q * det * torch.linalg.det(q).sign()


@pytest.mark.parametrize("task", TASKS)
def test_parameter_names_are_the_published_ones(task):
    prefix = f"{task}.state_dict."
    golden = {name.removeprefix(prefix) for name in load_file(GOLDEN) if name.startswith(prefix)}
    unused = {name for name in golden if ".lemb." in name or ".lin_edge_len." in name}
    assert len(unused) == 6
    assert small_model(task=TASKS[task]).state_dict().keys() == golden - unused


@pytest.mark.parametrize(("task", "count"), [("pretrain", 12_156_038), ("predict", 12_088_973)])
def test_published_size(task, count):
    model = ReferenceMGT(MGTConfig(task=task))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize("change", [{"views": "se3"}, {"fusion": "concat"}, {"denoising": "edge"}])
def test_only_the_published_model_is_covered(change):
    with pytest.raises(ValueError, match="published model only"):
        ReferenceMGT(MGTConfig(**change))


def test_element_without_features_is_named(crystals):
    graph, _ = crystals
    numbers = graph.numbers.clone()
    numbers[3] = 101
    with pytest.raises(ValueError, match=r"atomic numbers \[101\]"):
        small_model()(replace(graph, numbers=numbers))


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_nt_xent_is_the_sum_over_anchors_written_out(batch):
    torch.manual_seed(batch)
    a, b = torch.randn(2, batch, 5, dtype=torch.float64)
    rows = [*a, *b]

    def similarity(i, k):
        return float(rows[i] @ rows[k] / (rows[i].norm() * rows[k].norm()))

    total = 0.0
    for i in range(2 * batch):
        others = [math.exp(similarity(i, k)) for k in range(2 * batch) if k != i]
        total -= math.log(math.exp(similarity(i, (i + batch) % (2 * batch))) / sum(others))
    assert float(reference_nt_xent(a, b)) == pytest.approx(total / (2 * batch), rel=1e-12, abs=1e-12)


def test_denoising_target_is_a_mean_of_means(crystals):
    graph, noise = crystals
    expected = []
    for b in range(graph.num_crystals):
        atoms = range(int(graph.batch_ptr[b]), int(graph.batch_ptr[b + 1]))
        expected.append(torch.stack([noise.vector[graph.edge_index[1] == i].mean(0) for i in atoms]).mean(0))
    torch.testing.assert_close(crystal_mean_noise(graph, noise.vector), torch.stack(expected))


def test_pretraining_loss_weighs_its_parts(crystals):
    graph, noise = crystals
    parts = reference_pretraining_loss(small_model(task="pretrain")(graph, noise), graph, noise)
    expected = parts["contrastive"] + 0.5 * parts["se3_loss"] + 0.5 * parts["so3_loss"]
    torch.testing.assert_close(parts["loss"], expected)
    assert all(float(parts[name].detach()) > 0 for name in ("contrastive", "se3_loss", "so3_loss"))


@pytest.mark.parametrize("det", [1, -1])
def test_so3_features_are_equivariant(crystals, det):
    graph, _ = crystals
    model = small_model()
    encoder = model.so3_graph_encoder
    layer = encoder.equi_update[0]

    def features(edge_vec):
        x, sh, f = encoder.embed(model.atom_features[graph.numbers], edge_vec)
        return layer.features(x, graph.edge_index, sh, f).detach()

    rotation = random_rotation(1, det)
    plain, turned = features(graph.edge_vec), features(graph.edge_vec @ rotation.T)
    # e3nn computes Wigner matrices from float32 generators.
    wigner = layer.irreps_features.D_from_matrix(rotation.float()).double()
    torch.testing.assert_close(turned, plain @ wigner.T, rtol=0, atol=3e-6 * float(plain.abs().max()))
    for part, irrep in zip(layer.irreps_features.slices(), layer.irreps_features, strict=True):
        moved = (turned[:, part] - plain[:, part]).norm() / plain[:, part].norm()
        assert moved < 1e-12 if irrep.ir.l == 0 else moved > 0.1


def test_predictions_do_not_turn_with_the_crystal(crystals):
    graph, _ = crystals
    rotation = random_rotation(2, 1)
    turned = replace(graph, edge_vec=graph.edge_vec @ rotation.T, frame=graph.frame @ rotation.T)
    model = small_model()
    with torch.no_grad():
        torch.testing.assert_close(model(turned).prediction, model(graph).prediction, rtol=1e-10, atol=1e-12)


def test_each_view_sees_its_own_noise(crystals):
    graph, noise = crystals
    model = small_model()
    none = torch.zeros_like(noise.cosine)
    with torch.no_grad():
        clean = model(graph)
        cosine = model(graph, EdgeNoise(cosine=noise.cosine, vector=none))
        vector = model(graph, EdgeNoise(cosine=none, vector=noise.vector))
    assert torch.equal(cosine.so3_pool, clean.so3_pool)
    assert torch.equal(vector.se3_pool, clean.se3_pool)
    assert not torch.allclose(cosine.se3_pool, clean.se3_pool)
    assert not torch.allclose(vector.so3_pool, clean.so3_pool)


def test_noisy_cosines_may_leave_the_interval(crystals):
    graph, _ = crystals
    clean, none = edge_frame_cosines(graph), torch.zeros_like(graph.edge_vec)
    model = small_model()
    with torch.no_grad():  # every cosine seen is 1.02, then 1.10
        near, far = (model(graph, EdgeNoise(cosine=seen - clean, vector=none)) for seen in (1.02, 1.10))
    assert not torch.allclose(near.se3_pool, far.se3_pool)


def test_isolated_atom(crystals):
    graph, _ = crystals
    graph = replace(
        graph,
        numbers=torch.cat([graph.numbers, torch.tensor([6])]),
        batch_ptr=torch.cat([graph.batch_ptr, graph.batch_ptr[-1:] + 1]),
        row_ptr=torch.cat([graph.row_ptr, graph.row_ptr[-1:]]),
        frame=torch.cat([graph.frame, 20 * torch.eye(3, dtype=torch.float64)[None]]),
        ids=(*graph.ids, "alone"),
    )
    with torch.no_grad():
        prediction = small_model()(graph).prediction
        expected = small_model()(crystals[0]).prediction
    assert prediction.isfinite().all()
    torch.testing.assert_close(prediction[:-1], expected)


def test_shares_are_those_of_the_terms_in_the_prediction():
    torch.manual_seed(3)
    router = MixtureOfExperts(SMALL).double()
    views = list(torch.randn(2, 5, SMALL.channels, dtype=torch.float64))
    terms = []
    with torch.no_grad():
        whole, shares = router(views)
        weight = router.projection.weight.clone()
        for own in (slice(0, 2), slice(2, 4)):
            router.projection.weight.zero_()
            router.projection.weight[:, own] = weight[:, own]
            terms.append(router(views)[0] - router.projection.bias)
        torch.testing.assert_close(terms[0] + terms[1] + router.projection.bias, whole)
        size = torch.stack([term.abs().mean(1) for term in terms], dim=1)
        torch.testing.assert_close(shares, size / size.sum(1, keepdim=True))
        router.projection.weight.zero_()
        assert torch.equal(router(views)[1], torch.full((5, 2), 0.5, dtype=torch.float64))


def test_irreps_of_the_features():
    assert small_model().so3_graph_encoder.equi_update[0].irreps_features == o3.Irreps("8x0e + 3x1o + 3x2e")
