"""Each operation alone, forward and backward: time, rate, bandwidth, and share of the nearer roof.

On a GPU the Triton kernels stand beside their torch backend, on a CPU the torch backend beside the
operations as one would first write them (`plain`, e3nn). The arguments are those of the largest call in a
forward pass of the model on bundled crystals. Answers are compared with plain PyTorch in float64 on a smaller
batch before anything is timed. `costs` counts operations and bytes; the roofs are measured in the same run.
Backward passes are repeated on one kept forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from unittest import mock

import costs
import pairs
import plain
import pytest
import torch
import torch.nn.functional as F
from graphs import real_graph
from machine import affordable_rounds, clock, device, matmul_precision
from rivals import Rival
from torch import nn

from mgt_fast import MGT, MGTConfig, layers
from mgt_fast.kernels import node_attention
from mgt_fast.losses import draw_noise

# Where the model looks each operation up.
OPERATIONS = {
    "edge_attention": layers,
    "node_attention": layers,
    "tensor_product_1": layers,
    "tensor_product_2": layers,
    "residual_norm": layers,
    "rbf_embedding": layers,
    "segment_sum": node_attention,
}
CPU_RIVALS = (Rival("torch"), Rival("plain"))
RIVALS = (
    Rival("triton", "bf16"),
    Rival("triton", "tf32"),
    Rival("triton"),
    Rival("torch"),
    Rival("torch", "bf16"),
)
EQUIVARIANT_RIVALS = tuple(Rival(m, p) for m in ("e3nn", "cuequivariance") for p in ("float32", "bf16"))
TOLERANCES = {"float32": 1e-3, "tf32": 1e-2, "bf16": 1e-1}
ROUND_SECONDS = 0.2
PAIR_SECONDS = 0.8
ITERATIONS = 5 if torch.cuda.is_available() else 1  # calls a round: on a GPU the next is sent off meanwhile
VANISHING = 1e-3  # a tensor so much smaller than the largest is compared with that share of it


@dataclass(frozen=True)
class Case:
    """One benchmark."""

    operation: str
    direction: str
    rival: Rival
    channels: int
    edges: int
    check_edges: int

    @property
    def smoke(self) -> bool:
        return self.edges == self.check_edges

    @property
    def against(self) -> Case | None:
        """The case that a fast path is compared with; None for a rival's."""
        model, precision = self.rival.model, self.rival.precision
        if torch.cuda.is_available():
            slower = Rival("torch", "bf16" if precision == "bf16" else "float32")
            return replace(self, rival=slower) if model == "triton" else None
        slower = Rival("e3nn" if self.operation.startswith("tensor_product") else "plain")
        return replace(self, rival=slower) if model == "torch" else None

    def __str__(self):
        return f"{self.operation}-{self.direction}-C{self.channels}-{self.edges}_edges-{self.rival}"


def cases(smoke: bool) -> list[Case]:
    """What is run here, in order of value."""
    if smoke:
        batches = [(16, 20, 20)]
    elif torch.cuda.is_available():
        batches = [(256, 100_000, 1500), (128, 100_000, 1500), (512, 100_000, 1500)]
    else:
        batches = [(256, 5_000, 1500)]
    return [
        Case(operation, direction, rival, *batch)
        for batch in batches
        for operation in OPERATIONS
        for rival in rivals_of(operation, smoke)
        for direction in ("forward", "backward")
    ]


def rivals_of(operation: str, smoke: bool) -> list[Rival]:
    """Who computes an operation here."""
    equivariant = operation.startswith("tensor_product")
    if torch.cuda.is_available():
        return [*RIVALS, *EQUIVARIANT_RIVALS * equivariant]
    triton = (Rival("triton"),) * smoke  # in the interpreter
    if not equivariant:
        return [*triton, *CPU_RIVALS]
    return [*triton, CPU_RIVALS[0], *(rival for rival in EQUIVARIANT_RIVALS if rival.precision == "float32")]


def pytest_generate_tests(metafunc):
    found = cases(metafunc.config.getoption("smoke"))
    marked = [pytest.param(case, marks=[pytest.mark.fast] * (case.against is not None)) for case in found]
    metafunc.parametrize("case", marked, ids=map(str, found))


@lru_cache(maxsize=2)
def recorded_calls(channels: int, num_edges: int) -> dict[str, tuple]:
    """Arguments of each operation's largest call in a forward pass, and of the model's sizes."""
    torch.manual_seed(0)
    model = MGT(MGTConfig(task="pretrain", channels=channels, dropout=0.0), backend="torch").to(device())
    graph = real_graph(num_edges)
    calls: dict[str, tuple] = {}

    def keep(name: str, function: Callable, *args, **kwargs):
        if name not in calls or numbers(args) > numbers(calls[name]):
            calls[name] = args
        return function(*args, **kwargs)

    patches = [
        mock.patch.object(module, name, partial(keep, name, getattr(module, name)))
        for name, module in OPERATIONS.items()
    ]
    for patch in patches:
        patch.start()
    model(graph, draw_noise(graph, 0.05))
    for patch in patches:
        patch.stop()
    return calls


def numbers(args: tuple) -> int:
    """How many numbers the tensors among the arguments hold."""
    return sum(x.numel() for x in args if isinstance(x, torch.Tensor))


def fresh(x, dtype: torch.dtype):
    """Copy an argument; what another operation computed gets the type, the rest at least float32."""
    if isinstance(x, tuple):
        return tuple(fresh(part, dtype) for part in x)
    if isinstance(x, nn.Module):
        return copy.deepcopy(x).to(torch.promote_types(dtype, torch.float32))
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    wide = torch.promote_types(dtype, torch.float32)
    computed = x.requires_grad and x.ndim > 1 and not isinstance(x, nn.Parameter)
    return x.detach().to(dtype if computed else wide).requires_grad_(x.requires_grad)


def leaves(x) -> list[torch.Tensor]:
    """Tensors in an argument or a result that have a gradient."""
    if isinstance(x, tuple | list):
        return [leaf for part in x for leaf in leaves(part)]
    if isinstance(x, nn.Module):
        return list(x.parameters())
    return [x] if isinstance(x, torch.Tensor) and x.requires_grad else []


class Call:
    """An operation on its recorded arguments, as a rival computes it."""

    def __init__(self, case: Case, rival: Rival, num_edges: int, *, exact: bool = False):
        self.case, self.rival = case, rival
        recorded = recorded_calls(case.channels, num_edges)[case.operation]
        dtype = torch.bfloat16 if case.rival.precision == "bf16" else torch.float32
        self.args = fresh(recorded, dtype)
        if exact:  # of what the rival is given, so that rounding of the arguments does not count
            self.args = fresh(self.args, torch.float64)
        if rival.model in ("torch", "triton"):
            self.function = partial(getattr(OPERATIONS[case.operation], case.operation), backend=rival.model)
        elif rival.model == "plain":
            self.function = getattr(plain, case.operation)
        else:
            self.function = equivariant_product(rival.model, case.operation, self.args[5])

    def forward(self) -> list[torch.Tensor]:
        """Compute the outputs."""
        with torch.autocast(device().type, torch.bfloat16, enabled=self.rival.precision == "bf16"):
            return leaves(self.function(*self.args))

    def backward(self) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Return a function that computes every gradient, for a fixed gradient of the outputs."""
        outputs, inputs = self.forward(), leaves(self.args)
        generator = torch.Generator(device=device()).manual_seed(0)
        grads = [
            torch.randn(x.shape, generator=generator, device=device(), dtype=torch.float32).to(x.dtype)
            for x in outputs
        ]
        return lambda: torch.autograd.grad(outputs, inputs, grads, retain_graph=True)

    def run(self) -> Callable:
        """Return what is repeated in the case's direction."""
        return self.forward if self.case.direction == "forward" else self.backward()


def error(given: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Largest relative error of a tensor: norm of the difference over norm."""
    given, exact = [x.detach().double() for x in given], [y.detach() for y in exact]
    largest = max(y.norm() for y in exact)
    return max(
        float((x - y).norm() / max(y.norm(), VANISHING * largest)) for x, y in zip(given, exact, strict=True)
    )


@cache
def check(case: Case) -> float:
    """Compare outputs and gradients with float64 and return the larger error."""
    exact = Call(case, Rival("torch"), case.check_edges, exact=True)
    with matmul_precision(case.rival.precision):
        call = Call(case, case.rival, case.check_edges)
        found = max(error(call.forward(), exact.forward()), error(call.backward()(), exact.backward()()))
    tolerance = TOLERANCES[case.rival.precision]
    assert found <= tolerance, f"{case.rival}: {case.operation} is off by {found:.1e}, over {tolerance:.0e}"
    return found


@pytest.mark.benchmark(timer=clock)
def bench_kernel(benchmark, case, ceilings):
    benchmark.group = f"{case.operation} {case.direction}, C = {case.channels}, {case.edges} edges"
    found = check(case)
    call = Call(case, case.rival, case.edges)
    with matmul_precision(case.rival.precision):
        run = call.run()
        rounds = 1 if case.smoke else affordable_rounds(run, ROUND_SECONDS)
        benchmark.pedantic(run, rounds=rounds, iterations=1 if case.smoke else ITERATIONS)
        if case.against:
            rival = partial(checked, case.against)
            pairs.against(benchmark, f"bench_kernel[{case.against}]", run, rival, PAIR_SECONDS)
    if not benchmark.stats:  # nothing is timed with --benchmark-disable
        return
    seconds = benchmark.stats["median"]
    cost = getattr(operation_cost(case, call), case.direction)
    rate, bandwidth = ceilings.get(case.rival.precision, ceilings["float32"]), ceilings["copy"]
    benchmark.extra_info |= {
        "operation": case.operation,
        "direction": case.direction,
        "rival": str(case.rival),
        "channels": case.channels,
        "edges": case.edges,
        "tflops": cost.flops / seconds / 1e12,
        "gbytes_per_s": cost.bytes / seconds / 1e9,
        "intensity": cost.intensity,
        "roof": cost.roof(rate, bandwidth),
        "share": cost.floor(rate, bandwidth) / seconds,
        "error": found,
    }


def checked(case: Case) -> Callable:
    """Return what is repeated, once its answers have been compared."""
    check(case)
    return Call(case, case.rival, case.edges).run()


def operation_cost(case: Case, call: Call) -> costs.Operation:
    """What the recorded call must do at least."""
    graph = real_graph(case.edges)
    sizes = costs.Sizes(
        graph.num_atoms,
        graph.num_edges,
        graph.num_crystals,
        channels=case.channels,
        itemsize=2 if case.rival.precision == "bf16" else 4,
    )
    rows = len(call.args[0])
    if case.operation == "segment_sum":
        return costs.segment_sum(sizes, rows, graph.num_atoms)
    if case.operation in ("residual_norm", "rbf_embedding"):
        return getattr(costs, case.operation)(sizes, rows)
    return getattr(costs, case.operation)(sizes)


def equivariant_product(library: str, operation: str, shape) -> Callable:
    """Return the tensor product as users of another library write it, with our function's arguments.

    Every edge gets its own weights, then its own product; the mean over an atom's edges comes last.
    """
    ns, nv = shape.num_scalars, shape.num_vectors
    scalars, features = f"{ns}x0e", f"{ns}x0e + {nv}x1o + {nv}x2e"
    irreps = (scalars, features) if operation == "tensor_product_1" else (features, scalars)
    harmonics = "1x0e + 1x1o + 1x2e"
    if library == "e3nn":
        from e3nn import o3

        product = o3.FullyConnectedTensorProduct(
            irreps[0], harmonics, irreps[1], shared_weights=False, internal_weights=False
        )
    else:
        cue = pytest.importorskip("cuequivariance")
        cuet = pytest.importorskip("cuequivariance_torch")
        product = cuet.FullyConnectedTensorProduct(
            *(cue.Irreps("O3", x) for x in (irreps[0], harmonics, irreps[1])),
            layout=cue.mul_ir,
            shared_weights=False,
            internal_weights=False,
        )
    product = product.to(device())

    def compute(node, hidden, edge_vec, weight, bias, shape, receiver, sender):
        from e3nn import o3

        node = node if isinstance(node, torch.Tensor) else torch.cat([x.flatten(1) for x in node], dim=1)
        sh = o3.spherical_harmonics(harmonics, edge_vec, normalize=True, normalization="component")
        out = product(node[sender.index], sh.to(node.dtype), F.linear(hidden, weight, bias))
        total = out.new_zeros(len(node), out.shape[1]).index_add(0, receiver.index, out)
        mean = total / receiver.count.clamp(min=1)[:, None]
        if operation == "tensor_product_2":
            return mean
        mean, first, second = mean.split((ns, 3 * nv, 5 * nv), dim=1)
        return mean, first.unflatten(1, (nv, 3)), second.unflatten(1, (nv, 5))

    return compute
