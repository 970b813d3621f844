"""Rows spread over ranks and chunks give what the same rows give in one call."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.kernels.batch_norm import BatchNorm, batch_norm
from mgt_fast.kernels.gated_attention import gated_attention
from mgt_fast.kernels.residual_norm import residual_norm
from mgt_fast.kernels.segments import Segments
from mgt_fast.kernels.statistics import ChunkStatistics, RankStatistics, set_statistics
from mgt_fast.losses import draw_noise
from mgt_fast.padding import bucket, pad_graph

C, ROWS, PADDING = 16, 20, 5
CRYSTALS = [
    ([11, 17], [[0, 0, 0], [0.5, 0.48, 0.5]], [[0, 2.8, 2.8], [2.8, 0, 2.8], [2.8, 2.8, 0]]),
    ([29], [[0.1, 0.2, 0.3]], [[2.5, 0, 0], [0.1, 2.6, 0], [0, 0.2, 2.4]]),
    ([8, 12], [[0, 0, 0], [0.5, 0.5, 0.47]], [[3.0, 0.1, 0], [0, 2.9, 0], [0, 0.3, 3.3]]),
]
"""Numbers, fractional coordinates and cell of some crystals."""


@dataclass(frozen=True)
class Case:
    """What is computed, on which backend, and how."""

    name: str
    backend: str = "torch"
    padded: bool = False
    recompute: bool = False

    def __str__(self):
        ways = [way for way in ("padded", "recompute") if getattr(self, way)]
        return "-".join((self.name, self.backend, *ways))

    def problem(self):
        return (Network if self.name == "network" else Rows)(self)


CASES = [
    *(Case("batch_norm", padded=padded) for padded in (False, True)),
    *(
        Case(name, backend, padded)
        for name in ("residual_norm", "gated_attention_1", "gated_attention_3")
        for backend in ("torch", "triton")
        for padded in (False, True)
    ),
    Case("network"),
    Case("network", padded=True),
    Case("network", recompute=True),
    SLOW := Case("network", "triton"),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


class Rows:
    """An operation on random rows, some of which a call is given."""

    shares = ((0, ROWS),), ((0, 13), (13, ROWS)), ((0, 5), (5, 5), (5, ROWS))

    def __init__(self, case):
        torch.manual_seed(0)
        self.case = case
        attention = case.name.startswith("gated")
        num_keys = int(case.name[-1]) if attention else 1
        self.norm, self.key, self.value = BatchNorm(C), nn.Linear(C, C), nn.Linear(C, C)
        self.model = nn.ModuleList([self.norm, *([self.key, self.value] if attention else [])])
        nn.init.normal_(self.norm.weight)
        if attention:
            self.model.weight = nn.Parameter(torch.randn(2 * C, C))
            self.model.far = nn.Parameter(torch.randn(3, num_keys, 2 * C))
        self.model.double()
        shapes = ((num_keys, C), (3 * C,)) if attention else ((C,), (C,))
        if case.name == "batch_norm":
            shapes = shapes[:1]
        self.inputs = [torch.randn(ROWS, *shape, dtype=torch.float64) for shape in shapes]
        self.far_index = torch.arange(ROWS) % 3
        self.weights = torch.randn(ROWS, C, dtype=torch.float64)

    def __call__(self, share):
        rows = slice(*share)
        leaves = [tensor[rows].clone().requires_grad_() for tensor in self.inputs]
        inputs, far_index, count = leaves, self.far_index[rows], None
        if self.case.padded:
            inputs = [torch.cat((x, x.new_full((PADDING, *x.shape[1:]), 3))) for x in leaves]
            far_index = torch.cat((far_index, far_index.new_zeros(PADDING)))
            count = torch.tensor(share[1] - share[0])
        ways = {"count": count, "backend": self.case.backend}
        if self.case.name == "batch_norm":
            out = batch_norm(*inputs, self.norm, count)
        elif self.case.name == "residual_norm":
            out = residual_norm(*inputs, self.norm, **ways)
        else:
            x, near = inputs
            far = self.model.far, Segments(far_index, 3)
            out = gated_attention(
                x, self.model.weight, near, None, *far, self.key, self.value, self.norm, **ways
            )
        out = out[: share[1] - share[0]]
        return (out * self.weights[rows]).sum(), [out], leaves


class Network:
    """A small network on some crystals."""

    shares = ((0, 3),), ((0, 2), (2, 3)), ((0, 1), (1, 1), (1, 3))

    def __init__(self, case):
        torch.manual_seed(0)
        self.case = case
        blocks = 1 if case.backend == "triton" else 2  # Triton's interpreter is slow
        config = MGTConfig(
            task="pretrain", channels=C, num_scalars=16, num_vectors=2, num_blocks=blocks, dropout=0.0
        )
        self.model = MGT(config, case.backend).double()
        self.model.recompute = case.recompute

    def __call__(self, share, dtype=torch.float64):
        chosen = CRYSTALS[slice(*share)]
        numbers, frac, cells = ([crystal[i] for crystal in chosen] for i in range(3))
        batch = CrystalBatch.from_arrays(
            np.concatenate([np.zeros(0, int), *numbers]),
            np.concatenate([np.zeros((0, 3)), *frac]),
            np.array(cells).reshape(-1, 3, 3),
            np.array([len(n) for n in numbers], int),
        )
        graph = build_graph(batch, max_neighbors=3).to(dtype=dtype)
        keys, size = torch.arange(*share), graph.num_crystals
        if self.case.padded:
            graph = pad_graph(graph, *bucket(graph), size + 1)
            keys = torch.cat((keys, torch.tensor([7])))
        out = self.model(graph, draw_noise(graph, 0.05, keys))
        outs = [v[:size] for v in (out.se3_proj, out.so3_proj, out.se3_noise, out.so3_noise)]
        return sum(value.to(dtype).square().sum() for value in outs), outs, []


def found(problem, outs, leaves):
    """Arrays that describe a call: of rows, of parameters' gradients, of running statistics."""
    running = {n: b.numpy() for n, b in problem.model.named_buffers() if "running" in n or "num_b" in n}
    gradients = {n: 0 if p.grad is None else p.grad.numpy() for n, p in problem.model.named_parameters()}
    return [t.detach().numpy() for t in outs] + [t.grad.numpy() for t in leaves], gradients, running


@cache
def in_one_call(case):
    problem = case.problem()
    loss, outs, leaves = problem(problem.shares[0][0])
    loss.backward()
    return found(problem, outs, leaves)


def in_chunks(problem, shares, group=None):
    """Each chunk's rows, and the parameters' gradients and running statistics in the end."""
    with ChunkStatistics(problem.model, group) as statistics:
        with torch.no_grad():
            for _ in statistics.forward_sweeps():
                for share in shares:
                    problem(share)
        for _ in statistics.backward_sweeps():
            problem.model.zero_grad(set_to_none=False)
            calls = [problem(share) for share in shares]
            for loss, *_ in calls:
                loss.backward()
    rows = [found(problem, outs, leaves)[0] for _, outs, leaves in calls]
    return rows, *found(problem, (), ())[1:]


def assert_equal_in_parts(parts, expected):
    """Rows side by side, gradients added up, and everyone's running statistics are those of one call."""
    rows, gradients, running = expected
    close = {"rtol": 1e-10, "atol": 1e-10}
    for i, whole in enumerate(rows):
        np.testing.assert_allclose(np.concatenate([part[0][i] for part in parts]), whole, **close)
    for name, whole in gradients.items():
        np.testing.assert_allclose(sum(part[1][name] for part in parts), whole, err_msg=name, **close)
    for name, whole in running.items():
        np.testing.assert_allclose(parts[0][2][name], whole, err_msg=name, **close)
        assert all(np.array_equal(part[2][name], parts[0][2][name]) for part in parts), name


class CountedRanks(RankStatistics):
    """Counts how often norms meet."""

    met = 0

    def forward(self, norm, own):
        self.met += 1
        return super().forward(norm, own)

    def backward(self, norm, sums):
        self.met += 1
        return super().backward(norm, sums)


CHUNKED = (Case("gated_attention_3"), Case("network"))


def on_rank(rank):
    """Everything that is tried on ranks, in one group of three and in one of two."""
    torch.use_deterministic_algorithms(True)  # and NaN in fresh memory
    results = {}
    for size in (2, 3):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        for case in CASES:
            problem = case.problem()
            statistics = CountedRanks(group)
            set_statistics(problem.model, statistics)
            loss, outs, leaves = problem(problem.shares[size - 1][rank])
            loss.backward()
            results[size, case] = *found(problem, outs, leaves), statistics.met
        network = Case("network").problem()
        set_statistics(network.model.float(), RankStatistics(group))
        with torch.autocast("cpu", torch.bfloat16):
            loss, outs, _ = network(network.shares[size - 1][rank], torch.float32)
        loss.backward()
        results[size, "bf16"] = found(network, [out.float() for out in outs], ())
    for case in CHUNKED:
        problem = case.problem()
        first, second, third = problem.shares[2]
        shares = ([first], [second, third], [])[rank]  # one chunk, two of which one is empty, none
        rows, *others = in_chunks(problem, shares, group)
        results["chunks", case] = rows, *others
    norm = BatchNorm(4)
    norm.statistics = RankStatistics(group)
    with pytest.raises(ValueError, match="at least 2 rows, got 1 in the whole batch"):
        batch_norm(torch.ones(int(rank == 1), 4), norm)
    return results


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    pytest.importorskip("triton")
    return run_ranks(on_rank, 3, tmp_path_factory.mktemp("ranks"))


@each_case
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_equal_one_process(case, size, on_ranks):
    results = [results[size, case] for results in on_ranks[:size]]
    assert_equal_in_parts([result[:3] for result in results], in_one_call(case))
    norms = sum(isinstance(module, BatchNorm) for module in case.problem().model.modules())
    assert {result[3] for result in results} == {2 * norms}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_under_autocast(size, on_ranks):
    problem = Case("network").problem()
    problem.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, outs, _ = problem((0, 3), torch.float32)
    loss.backward()
    rows, gradients, _ = found(problem, [out.float() for out in outs], ())
    parts = [results[size, "bf16"] for results in on_ranks[:size]]
    for i, whole in enumerate(rows):
        error = np.linalg.norm(np.concatenate([part[0][i] for part in parts]) - whole)
        assert error <= 0.02 * np.linalg.norm(whole)
    whole = np.concatenate([g.ravel() for g in gradients.values()])
    total = np.concatenate([sum(part[1][name] for part in parts).ravel() for name in gradients])
    assert np.linalg.norm(total - whole) <= 0.05 * np.linalg.norm(whole)


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunks_of_ranks_equal_one_process(case, on_ranks):
    results = [results["chunks", case] for results in on_ranks]
    parts = [(rows, {}, {}) for result in results for rows in result[0]]
    rows, gradients, running = in_one_call(case)
    assert_equal_in_parts(parts, (rows, {}, {}))
    assert_equal_in_parts(results, ([], gradients, running))


@pytest.mark.parametrize("case", [case for case in CASES if case != SLOW], ids=str)
def test_chunks_equal_one_call(case):
    if case.backend == "triton":
        pytest.importorskip("triton")
    problem = case.problem()
    rows, gradients, running = in_chunks(problem, problem.shares[2])
    expected = in_one_call(case)
    assert_equal_in_parts([(part, {}, {}) for part in rows], (expected[0], {}, {}))
    assert_equal_in_parts([([], gradients, running)], ([], *expected[1:]))


def sweeps(statistics, model, chunks):
    """Numbers of sweeps forward and backward."""
    counts = [0, 0]
    for _ in statistics.forward_sweeps():
        counts[0] += 1
        for chunk in chunks:
            model(chunk)
    for _ in statistics.backward_sweeps():
        counts[1] += 1
        for chunk in chunks:
            model(chunk).square().sum().backward()
    return counts


class Chain(nn.Module):
    def __init__(self, *norms, noise=0.0):
        super().__init__()
        self.norms, self.noise = nn.ModuleList(norms), noise

    def forward(self, x):
        for norm in self.norms:
            x = batch_norm(x, norm).exp() + self.noise * torch.rand(())
        return x


def test_sweeps_are_one_more_than_norms_one_behind_the_other():
    torch.manual_seed(0)
    model = Chain(*(BatchNorm(3) for _ in range(3)))
    with ChunkStatistics(model) as statistics:
        assert sweeps(statistics, model, torch.randn(2, 5, 3)) == [4, 4]
        assert all(norm.num_batches_tracked == 0 for norm in model.norms)
    assert all(norm.num_batches_tracked == 1 and norm.statistics is None for norm in model.norms)


def test_a_network_that_draws_anew_does_not_settle():
    model = Chain(BatchNorm(3), BatchNorm(3), noise=1.0)
    with (
        pytest.raises(RuntimeError, match="forward statistics still change after 4 sweeps"),
        ChunkStatistics(model) as statistics,
    ):
        sweeps(statistics, model, torch.randn(2, 5, 3))
    assert all(norm.num_batches_tracked == 0 and norm.statistics is None for norm in model.norms)


def test_chunks_out_of_order():
    model = Chain(BatchNorm(3))
    with ChunkStatistics(model) as statistics:
        with pytest.raises(RuntimeError, match="inside a sweep alone"):
            model(torch.randn(5, 3))
        with pytest.raises(RuntimeError, match="go through forward_sweeps"):
            next(statistics.backward_sweeps())


def test_one_row_in_all_chunks_has_no_statistics():
    model = Chain(BatchNorm(3))
    with (
        pytest.raises(ValueError, match="at least 2 rows, got 1 in the whole batch"),
        ChunkStatistics(model) as statistics,
    ):
        sweeps(statistics, model, [torch.ones(1, 3), torch.ones(0, 3)])
