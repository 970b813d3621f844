"""Layers that are computed again in the backward pass give what layers that keep everything give."""

import dataclasses

import pytest
import torch

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.kernels.batch_norm import BatchNorm
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.losses import draw_noise
from mgt_fast.padding import bucket, pad_graph

CONFIG = MGTConfig(task="pretrain", channels=16, num_scalars=16, num_vectors=2, dropout=0.0)


def small_graph(dtype, max_neighbors=4):
    batch = CrystalBatch.from_arrays(
        numbers=[11, 17, 29],
        frac_coords=[[0, 0, 0], [0.5, 0.48, 0.5], [0.1, 0.2, 0.3]],
        cell=[[[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]], [[2.5, 0, 0], [0.1, 2.6, 0], [0, 0.2, 2.4]]],
        num_atoms=[2, 1],
    )
    return build_graph(batch, max_neighbors=max_neighbors).to(dtype=dtype)


def step(model, graph, *, recompute, passes=1, autocast=False):
    """Outputs, gradients and buffers of a training step from the same weights."""
    torch.manual_seed(0)
    model.recompute = recompute
    noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(graph, noise)
    loss = sum(
        getattr(out, name).float().square().sum()
        for name in ("se3_proj", "so3_proj", "se3_noise", "so3_noise")
    )
    for remaining in reversed(range(passes)):
        loss.backward(retain_graph=remaining > 0)
    running = [buffer for name, buffer in model.named_buffers() if ".bn" in name]
    return [out.se3_proj, out.so3_proj, *(p.grad for p in model.parameters()), *running]


def fresh(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return MGT(dataclasses.replace(CONFIG, **changes)).to(dtype)


def assert_bitwise_equal(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_and_statistics_are_bitwise_those_of_kept_layers(dtype, padded):
    graph = small_graph(dtype)
    if padded:
        graph = pad_graph(graph, *bucket(graph), graph.num_crystals + 1)
    assert_bitwise_equal(
        step(fresh(dtype), graph, recompute=True), step(fresh(dtype), graph, recompute=False)
    )


def test_autocast():
    graph = small_graph(torch.float32)
    kept, again = (
        step(fresh(torch.float32), graph, recompute=recompute, autocast=True) for recompute in (False, True)
    )
    assert_bitwise_equal(again, kept)


def test_a_second_backward_pass_computes_a_third_time():
    graph = small_graph(torch.float64)
    assert_bitwise_equal(
        step(fresh(), graph, recompute=True, passes=2), step(fresh(), graph, recompute=False, passes=2)
    )


def test_outside_training():
    graph = small_graph(torch.float64)
    kept, again = (step(fresh().eval(), graph, recompute=recompute) for recompute in (False, True))
    assert_bitwise_equal(again, kept)


def test_running_statistics_move_once():
    model = fresh()
    step(model, small_graph(torch.float64), recompute=True)
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    assert len(norms) == 14
    assert all(norm.num_batches_tracked == 1 and norm.tape is None for norm in norms)


def test_triton():
    pytest.importorskip("triton")
    graph = small_graph(torch.float64, max_neighbors=2)
    runs, launched = [], []
    for recompute in (False, True):
        model = fresh(num_blocks=1)
        model.backend = "triton"
        with watch_launches() as launches:
            runs.append(step(model, graph, recompute=recompute))
        launched.append([launch.name for launch in launches])
    assert_bitwise_equal(*runs)
    once, twice = (names.count for names in launched)
    assert twice("keys_kernel") == 2 * once("keys_kernel")
    # What the norms found the first time is there the second time.
    assert twice("_partial_statistics_kernel") == once("_partial_statistics_kernel")
