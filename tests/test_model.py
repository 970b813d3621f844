import dataclasses

import pytest
import torch
from scipy.spatial.transform import Rotation

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph, layers
from mgt_fast.kernels import random
from mgt_fast.losses import draw_noise
from mgt_fast.model import Dropout
from mgt_fast.outputs import EdgeNoise

SMALL = MGTConfig(channels=16, num_scalars=8, num_vectors=2, expert_hidden=8, dropout=0.0)


def crystals():
    """Rock salt (primitive cell) and a one-atom crystal, jittered cells."""
    return CrystalBatch.from_arrays(
        numbers=[11, 17, 29],
        frac_coords=[[0, 0, 0], [0.5, 0.48, 0.5], [0.1, 0.2, 0.3]],
        cell=[[[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]], [[2.5, 0, 0], [0.1, 2.6, 0], [0, 0.2, 2.4]]],
        num_atoms=[2, 1],
    )


@pytest.fixture(scope="module")
def graph():
    return build_graph(crystals(), max_neighbors=8).to(dtype=torch.float64)


def make(**changes):
    torch.manual_seed(0)
    return MGT(dataclasses.replace(SMALL, **changes)).double()


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, {"mixture_of_experts", "se3_graph_encoder", "so3_graph_encoder"}, {"expert"}),
        ({"fusion": "concat"}, {"expert", "se3_graph_encoder"}, {"mixture_of_experts"}),
        ({"views": "se3"}, {"expert", "se3_graph_encoder"}, {"so3_graph_encoder", "so3_projection_encoder"}),
        ({"views": "so3"}, {"expert", "so3_graph_encoder"}, {"se3_graph_encoder", "se3_projection_encoder"}),
        ({"task": "pretrain"}, {"se3_angle_layer", "so3_edge_layer"}, {"expert", "mixture_of_experts"}),
        ({"output_dim": 3}, {"mixture_of_experts"}, {"expert"}),
    ],
    ids=str,
)
def test_ablations(graph, changes, present, absent):
    model = make(**changes)
    parts = {name.split(".")[0] for name in model.state_dict()}
    assert present <= parts
    assert not absent & parts
    out = model(graph, draw_noise(graph, 0.05, torch.arange(graph.num_crystals)))
    if model.config.task == "predict":
        assert out.prediction.shape == (2, model.config.output_dim)
        loss = out.prediction.square().sum()
    else:
        assert out.prediction is None
        loss = out.se3_noise.square().sum() + out.so3_noise.square().sum()
        loss = loss + out.se3_proj.sum() + out.so3_proj.sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"fusion": "concat"}, {"task": "pretrain"}], ids=str)
def test_dropout_is_decided_by_the_crystal_s_key(graph, changes):
    def embeddings(keys):
        out = model(graph, keys=keys)
        return (
            torch.cat((out.se3_proj, out.so3_proj), 1)
            if out.prediction is None
            else torch.cat((out.prediction, out.se3_proj), 1)
        ).detach()

    model = make(**changes, dropout=0.5)
    keys = torch.tensor([3, 4])
    first = embeddings(keys)
    assert torch.equal(first, embeddings(keys))
    assert not torch.equal(embeddings(None), embeddings(None))
    other = embeddings(torch.tensor([3, 5]))
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    model.eval()
    assert torch.equal(embeddings(keys), embeddings(None))


def test_dropout_keeps_the_mean_and_differs_by_purpose():
    keys, x = torch.arange(300), torch.ones(300, 50)
    dropped = [Dropout(0.2, purpose)(x, keys) for purpose in (1, 2)]
    for values in dropped:
        assert set(values.unique().tolist()) == {0.0, 1.25}
        assert values.mean() == pytest.approx(1, abs=0.02)
    both = ((dropped[0] == 0) & (dropped[1] == 0)).float().mean()
    assert both == pytest.approx(0.04, abs=0.01)
    assert Dropout(1.0, 1)(x, keys).abs().max() == 0


def test_fresh_per_edge_heads_predict_no_noise(graph):
    out = make(task="pretrain", denoising="edge")(graph, draw_noise(graph, 0.05))
    assert out.se3_noise.abs().max() == out.so3_noise.abs().max() == 0


def test_contributions(graph):
    out = make().eval()(graph)
    torch.testing.assert_close(out.contributions.sum(1), torch.ones(2, dtype=torch.float64))
    assert (out.contributions > 0).all()
    assert make(views="se3").eval()(graph).contributions.tolist() == [[1, 0]] * 2
    assert make(views="so3").eval()(graph).contributions.tolist() == [[0, 1]] * 2
    assert make(fusion="concat").eval()(graph).contributions is None


def test_contribution_is_the_share_of_the_view_in_the_prediction(graph):
    model = make().eval()
    router = model.mixture_of_experts
    before = model(graph)
    with torch.no_grad():
        router.projection.weight[:, 1] = 0  # silence the SO(3) view's term
        se3_term = model(graph).prediction - router.projection.bias
    so3_term = before.prediction - router.projection.bias - se3_term
    share = se3_term.abs() / (se3_term.abs() + so3_term.abs())
    torch.testing.assert_close(before.contributions[:, :1], share)


def test_each_view_sees_its_own_noise_alone(graph):
    model = make().eval()
    clean = model(graph)
    noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))
    nothing = torch.zeros_like(noise.cosine)
    only_cosine = model(graph, EdgeNoise(cosine=noise.cosine, vector=nothing))
    only_vector = model(graph, EdgeNoise(cosine=nothing, vector=noise.vector))
    assert torch.equal(only_cosine.so3_pool, clean.so3_pool)
    assert not torch.allclose(only_cosine.se3_pool, clean.se3_pool)
    assert torch.equal(only_vector.se3_pool, clean.se3_pool)
    assert not torch.allclose(only_vector.so3_pool, clean.so3_pool)


def test_per_edge_noise_turns_with_the_crystal(graph):
    model = make(task="pretrain", denoising="edge").eval()
    for head in (model.se3_angle_layer, model.so3_edge_layer):  # fresh heads predict zero
        torch.nn.init.normal_(head.head.out.weight)
    noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))
    turn = torch.tensor(Rotation.random(random_state=1).as_matrix()).t()
    turned = dataclasses.replace(graph, edge_vec=graph.edge_vec @ turn, frame=graph.frame @ turn)
    before = model(graph, noise)
    after = model(turned, EdgeNoise(cosine=noise.cosine, vector=noise.vector @ turn))
    assert before.se3_noise.shape == before.so3_noise.shape == (graph.num_edges, 3)
    torch.testing.assert_close(after.se3_noise, before.se3_noise)
    torch.testing.assert_close(after.so3_noise, before.so3_noise @ turn)


def test_lengths_are_converted_to_the_parameters_type(graph):
    torch.manual_seed(0)
    model = MGT(SMALL).eval()
    noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))
    single = EdgeNoise(cosine=noise.cosine.float(), vector=noise.vector.float())
    converted = model(graph, noise).prediction
    assert converted.dtype == torch.float32
    assert torch.equal(converted, model(graph.to(dtype=torch.float32), single).prediction)


def test_backends():
    with pytest.raises(ValueError, match="backend = 'cuda'; choose one of auto, torch, triton"):
        MGT(SMALL, backend="cuda")


def test_element_without_features_is_named(graph):
    graph = dataclasses.replace(graph, numbers=torch.tensor([11, 17, 117]))
    with pytest.raises(ValueError, match=r"no CGCNN features for atomic numbers \[117\]"):
        make()(graph)


def test_two_runs_are_bitwise_equal(graph):
    outs = []
    for _ in range(2):
        model = make()
        prediction = model(graph).prediction
        prediction.square().sum().backward()
        outs.append([prediction, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_sharing_equal_lengths_and_angles_changes_nothing(graph, monkeypatch):
    outs = []
    for worth in (0.0, 2.0):  # never, always
        monkeypatch.setattr(layers, "WORTH_SHARING", worth)
        model = make().double()
        prediction = model(graph).prediction
        prediction.square().sum().backward()
        outs.append([prediction, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-11)


def test_noise_and_dropout_share_no_random_numbers(graph):
    keys, drawn = torch.tensor([3, 4]), []
    words = random.random_words

    def spy(some_keys, columns):
        drawn.append(some_keys.tolist())
        return words(some_keys, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "random_words", spy)
        model = make(dropout=0.5)
        model(graph, draw_noise(graph, 0.05, keys), keys)
    assert [len(used) for used in drawn] == [graph.num_edges, 2, 2, 2, 2]
    assert len({key for used in drawn for key in used}) == graph.num_edges + 8
