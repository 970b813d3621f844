"""The programs that compute MGT, and what each is asked to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from graphs import real_graph
from machine import device, matmul_precision

from mgt_fast import MGT, CrystalGraph, MGTConfig
from mgt_fast.losses import draw_noise, mean_over_crystals, pretraining_loss
from mgt_fast.reference import ReferenceMGT
from mgt_fast.train.capture import CapturedStep
from mgt_fast.train.step import Batch, Chunk, StepResult

MODELS = {
    "reference": ReferenceMGT,
    "torch": partial(MGT, backend="torch"),
    "triton": partial(MGT, backend="triton"),
}
TASKS = {"training step": "pretrain", "fine-tuning step": "predict", "prediction": "predict"}
ERROR_RATIO = 3.0
"""An answer's error may be so many times that of the uncompiled reference in the same precision."""
ERROR_FLOOR = 1e-5
"""Errors below are rounding."""


@dataclass(frozen=True)
class Rival:
    """One way to compute.

    Attributes:
        model: a key of `MODELS`.
        precision: of the matrix products: "float32", "tf32" or "bf16" (autocast).
        compiled: by torch.compile.
        captured: padded, and replayed as CUDA graphs; fine-tuning steps alone.
    """

    model: str
    precision: str = "float32"
    compiled: bool = False
    captured: bool = False

    def __str__(self):
        suffixes = (*["compiled"] * self.compiled, *["captured"] * self.captured)
        return "-".join((self.model, self.precision, *suffixes))


REFERENCE = Rival("reference")
CPU_RIVALS = (REFERENCE, Rival("torch"), Rival("reference", "bf16"), Rival("torch", "bf16"))
EAGER_RIVALS = (
    REFERENCE,
    Rival("triton", "bf16"),
    Rival("triton", "tf32"),
    Rival("triton"),
    Rival("reference", "tf32"),
    Rival("torch"),
)
CAPTURED_RIVALS = tuple(
    Rival("triton", precision, captured=True) for precision in ("bf16", "tf32", "float32")
)
COMPILED_RIVALS = (Rival("reference", "bf16", compiled=True), Rival("torch", "bf16", compiled=True))


class Runner:
    """A rival with its network; all start from the same weights.

    Args:
        rival: how to compute.
        channels: C.
        work: a key of `TASKS`.
        compiler: backend of torch.compile.
        dtype: of the network.
    """

    def __init__(
        self,
        rival: Rival,
        channels: int,
        work: str,
        *,
        compiler: str = "inductor",
        dtype: torch.dtype = torch.float32,
    ):
        self.rival, self.work = rival, work
        config = MGTConfig(task=TASKS[work], channels=channels, dropout=0.0)
        self.network = MODELS[rival.model](config)
        self.network.load_state_dict(initial_weights(config))
        self.network.to(device=device(), dtype=dtype).train(work != "prediction")
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=device().type == "cuda")
        self.model = self.network
        if rival.compiled:
            torch._dynamo.config.recompile_limit = 64  # beyond it the rest would silently run uncompiled
            self.model = torch.compile(self.network, dynamic=True, backend=compiler)

    @property
    def sizes(self) -> dict[str, int]:
        """The network's sizes that `costs.Sizes` asks for."""
        names = ("channels", "num_scalars", "num_vectors", "num_blocks")
        return {name: getattr(self.network.config, name) for name in names}

    def precision(self) -> AbstractContextManager:
        """Context in which the rival's matrices are multiplied."""
        return matmul_precision(self.rival.precision)

    def computation(self, graph: CrystalGraph) -> Callable[[], torch.Tensor]:
        """Return a function that computes the loss, or without gradient the predictions."""
        if self.work == "training step":
            noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals, device=graph.edge_vec.device))
        target = torch.linspace(-1, 1, graph.num_crystals, device=device())[:, None]

        def compute():
            with torch.autocast(device().type, torch.bfloat16, enabled=self.rival.precision == "bf16"):
                if self.work == "training step":
                    return pretraining_loss(self.model(graph, noise), graph, noise).total
                prediction = self.model(graph).prediction
            return prediction if self.work == "prediction" else F.mse_loss(prediction.float(), target)

        return torch.inference_mode()(compute) if self.work == "prediction" else compute

    def step(self, graph: CrystalGraph) -> Callable[[], None]:
        """Return the function to be timed: one step, or one prediction."""
        if self.rival.captured:
            gradients, update = self.captured(graph)
            return lambda: (gradients(), update())
        compute = self.computation(graph)
        if self.work == "prediction":
            return compute

        def step():
            self.optimizer.zero_grad(set_to_none=True)
            compute().backward()
            self.optimizer.step()

        return step

    def captured(self, graph: CrystalGraph) -> tuple[Callable[[], StepResult], Callable[[], None]]:
        """Return the halves of a captured step; the graph is padded on the CPU and copied in each."""
        step = CapturedStep(SmallBatch(self.network, graph.num_crystals, self.rival.precision))
        crystals = np.arange(graph.num_crystals)
        keys = places = torch.from_numpy(crystals)
        chunk = Chunk(graph.to(device="cpu"), crystals, places, keys)
        batch = Batch(1, 0, graph.num_crystals, graph.num_edges, (chunk,))
        gradients = partial(step.gradients, batch)
        return gradients, partial(step.update, 1e-5)

    def answers(self, graph: CrystalGraph) -> dict[str, torch.Tensor]:
        """Compute predictions, or the loss and the gradient of all parameters, in float64."""
        parameters = [p for _, p in sorted(self.network.named_parameters())]
        with self.precision():
            if self.rival.captured:
                gradients, _ = self.captured(graph)
                value = [gradients() for _ in range(3)][-1].loss  # as it stands, captured, and replayed
                gradient = [p.grad for p in parameters]
                return joined(value, gradient)
            value = self.computation(graph)()
            if self.work == "prediction":
                return {"prediction": value.double()}
            gradient = torch.autograd.grad(value, parameters)
        return joined(value, gradient)


def joined(loss: torch.Tensor, gradient: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a loss and the gradient of all parameters in float64."""
    return {
        "loss": loss.detach().double(),
        "gradient": torch.cat([g.double().flatten() for g in gradient]),
    }


@dataclass(frozen=True)
class SmallBatch:
    """What `CapturedStep` asks of a task: the squared error of predictions, as in `Runner.computation`."""

    model: torch.nn.Module
    largest_batch: int
    precision: str

    def batch_targets(self, crystals: np.ndarray) -> torch.Tensor:
        """Return the targets, (B,)."""
        return torch.linspace(-1, 1, len(crystals))

    def loss_of(
        self, graph: CrystalGraph, targets: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        """Return the loss, and no figures."""
        with torch.autocast(device().type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.model(graph, keys=keys).prediction.squeeze(1)
        return mean_over_crystals((prediction.float() - targets).square(), graph), {}


@lru_cache(maxsize=1)
def initial_weights(config: MGTConfig) -> dict[str, torch.Tensor]:
    """The weights that every rival starts from."""
    torch.manual_seed(0)
    return ReferenceMGT(config).state_dict()


@cache
def exact_answers(channels: int, work: str, num_edges: int) -> dict[str, torch.Tensor]:
    """What the reference answers in float64."""
    return Runner(REFERENCE, channels, work, dtype=torch.float64).answers(real_graph(num_edges))


@cache
def reference_errors(channels: int, work: str, num_edges: int, precision: str) -> dict[str, float]:
    """How far off the uncompiled reference is in some precision."""
    return errors(Runner(Rival("reference", precision), channels, work), channels, num_edges)


def errors(runner: Runner, channels: int, num_edges: int) -> dict[str, float]:
    """Relative errors of a runner with fresh weights: norm of the difference over norm."""
    exact = exact_answers(channels, runner.work, num_edges)
    given = runner.answers(real_graph(num_edges))
    return {name: float((given[name] - x).norm() / x.norm()) for name, x in exact.items()}


def checked_runner(
    rival: Rival, channels: int, work: str, *, check_edges: int, compiler: str = "inductor"
) -> tuple[Runner, dict[str, float]]:
    """Return a runner that has given the right answers, and its errors.

    Raises:
        AssertionError: if an error is over `ERROR_RATIO` times that of the reference in the same precision.
    """
    runner = Runner(rival, channels, work, compiler=compiler)
    allowed = reference_errors(channels, work, check_edges, rival.precision)
    found = errors(runner, channels, check_edges)
    for name, error in found.items():
        limit = ERROR_RATIO * max(allowed[name], ERROR_FLOOR)
        assert error <= limit, f"{rival}: {name} is off by {error:.1e}, and may be by {limit:.1e}"
    return runner, found
