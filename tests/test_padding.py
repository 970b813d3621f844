import dataclasses

import pytest
import torch

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.losses import draw_noise, pretraining_loss
from mgt_fast.padding import EDGES_A_FILLER_ATOM, bucket, pad_graph, round_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = MGTConfig(
    channels=16, num_scalars=8, num_vectors=2, num_blocks=1, expert_hidden=8, dropout=0.0, output_dim=2
)


@pytest.fixture(scope="module")
def graph():
    """Rock salt and a one-atom crystal."""
    crystals = CrystalBatch.from_arrays(
        numbers=[11, 17, 29],
        frac_coords=[[0, 0, 0], [0.5, 0.48, 0.5], [0.1, 0.2, 0.3]],
        cell=[[[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]], [[2.5, 0, 0], [0.1, 2.6, 0], [0, 0.2, 2.4]]],
        num_atoms=[2, 1],
    )
    return build_graph(crystals, max_neighbors=6).to(dtype=torch.float64, device=DEVICE)


def sizes(graph, atoms, edges, crystals):
    return graph.num_atoms + atoms, graph.num_edges + edges, graph.num_crystals + crystals


@pytest.mark.parametrize("more", [(1, 0, 1), (3, 7, 1), (5, 3, 4), (0, 0, 2)], ids=str)
def test_indices_stay_valid(graph, more):
    padded = pad_graph(graph, *sizes(graph, *more))
    assert (padded.num_atoms, padded.num_edges, padded.num_crystals) == sizes(graph, *more)
    assert padded.num_real.tolist() == [graph.num_crystals, graph.num_atoms, graph.num_edges]
    n, e, b = graph.num_atoms, graph.num_edges, graph.num_crystals
    for name, size, filler in zip(
        ("numbers", "edge_vec", "cell_shift", "frame"), (n, e, e, b), (*more[:2], *more[1:]), strict=True
    ):
        assert getattr(padded, name).shape[0] == size + filler
        assert torch.equal(getattr(padded, name)[:size], getattr(graph, name))
    assert torch.equal(padded.edge_index[:, :e], graph.edge_index)
    assert (padded.edge_index[:, e:] >= n).all()
    assert torch.equal(padded.batch[:n], graph.batch)
    assert (padded.batch[n:] >= b).all()
    atoms = torch.arange(padded.num_atoms, device=DEVICE)
    assert torch.equal(atoms.repeat_interleave(padded.row_ptr.diff()), padded.edge_index[0])
    degree = padded.row_ptr.diff()[n:]
    if more[0]:
        assert degree.max() - degree.min() <= 1
    assert len(padded.ids) == padded.num_crystals
    assert padded.to(dtype=torch.float32).num_real.dtype == torch.int64


def loss_and_state(graph, backend, num_real=None):
    torch.manual_seed(0)
    model = MGT(SMALL, backend=backend).double().to(DEVICE)
    prediction = model(graph).prediction[:num_real]
    loss = (prediction - torch.tensor([0.3, -0.2], dtype=torch.float64, device=DEVICE)).square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    running = {name: buffer for name, buffer in model.named_buffers() if ".bn" in name}
    assert running
    return {"loss": loss, "prediction": prediction}, gradients, running


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_padding_changes_nothing_of_a_training_step(graph, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    real = graph.num_crystals
    expected = loss_and_state(graph, backend)
    found = loss_and_state(pad_graph(graph, *sizes(graph, 4, 37, 2)), backend, real)
    for got, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(
                got[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_sizes_are_few_and_near():
    for multiple in (16, 64):
        sizes = {round_up(n, multiple) for n in range(1, 100_000)}
        assert all(size % multiple == 0 for size in sizes)
        assert len(sizes) < 8 * 17
        for n in (1, 15, 16, 17, 1000, 1024, 1025, 99_999):
            assert n <= round_up(n, multiple) < n + max(multiple, n / 8 + 1)


def test_bucket_has_room_for_filler(graph):
    atoms, edges = bucket(graph)
    padded = pad_graph(graph, atoms, edges, graph.num_crystals + 1)
    assert atoms > graph.num_atoms
    assert padded.row_ptr.diff()[graph.num_atoms :].max() <= EDGES_A_FILLER_ATOM


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((-1, 0, 1), "3 atoms cannot be padded to 2"),
        ((1, 0, 0), "0 filler edges, 1 filler atoms and 0 filler crystals"),
        ((0, 5, 1), "5 filler edges, 0 filler atoms"),
    ],
)
def test_impossible_sizes_are_refused(graph, more, message):
    with pytest.raises(ValueError, match=message):
        pad_graph(graph, *sizes(graph, *more))


def test_padded_graphs_are_not_padded_again(graph):
    padded = pad_graph(graph, *sizes(graph, 1, 0, 1))
    with pytest.raises(ValueError, match="padded already"):
        pad_graph(padded, *sizes(padded, 1, 0, 1))


def test_pretraining_losses_refuse_filler(graph):
    model = MGT(dataclasses.replace(SMALL, task="pretrain", output_dim=1)).double().to(DEVICE)
    padded = pad_graph(graph, *sizes(graph, 1, 0, 1))
    noise = draw_noise(padded, 0.05)
    with pytest.raises(ValueError, match="padded graph"):
        pretraining_loss(model(padded, noise), padded, noise)
