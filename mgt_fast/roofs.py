"""The roofs that bound an operation, and what a program's operations must do at least.

An operation of so many floating-point operations (FLOP) and bytes takes at least
max(FLOP / rate, bytes / bandwidth) seconds; its share of the nearer roof is that time over the measured one.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def floor(self, flop_rate: float, bandwidth: float) -> float:
        """Seconds it takes at least."""
        return max(self.flops / flop_rate, self.bytes / bandwidth)

    def roof(self, flop_rate: float, bandwidth: float) -> str:
        """The nearer roof: "products" or "memory"."""
        return "products" if self.flops / flop_rate > self.bytes / bandwidth else "memory"


def _fastest(run: Callable[[], object], device: torch.device, rounds: int = 10, warmup: int = 3) -> float:
    """Seconds of the fastest `run()`, whose work is on `device`."""
    times = []
    for _ in range(warmup + rounds):
        start = _clock(device)
        run()
        times.append(_clock(device) - start)
    return min(times[warmup:])


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Name the processor that computes on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{model}, {torch.get_num_threads()} threads"


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Multiply float32 matrices in TF32 inside the block if `precision` is "tf32", else in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_ceilings(
    device: torch.device, size: int, num_bytes: int, precisions: Iterable[str]
) -> dict[str, float]:
    """Measure the roofs, on random data (on zeros a GPU runs faster).

    Args:
        device: the device.
        size: of the square matrices to be multiplied.
        num_bytes: size of the array to be copied.
        precisions: of the products: "float32", "tf32" (on a GPU), "bf16".

    Returns:
        "copy": bytes read and written a second; by precision: FLOP a second of a matrix product.
    """
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)}
    left, right = torch.randn(2, size, size, device=device)
    for precision in precisions:
        a, b = (left.bfloat16(), right.bfloat16()) if precision == "bf16" else (left, right)
        with matmul_precision(precision):
            found[precision] = 2 * size**3 / _fastest(lambda a=a, b=b: a @ b, device)
    return found


def operation_name(name: str) -> str:
    """Return what an operation and its variant in place have in common, as "aten::add".

    Which of the two adds up gradients is autograd's choice, and another one while operations are counted.
    """
    return name.removesuffix("_")


@dataclass
class Tally:
    """What the calls of one operation must do at least, together.

    Attributes:
        calls: their number.
        flops, bytes: floating-point operations of products, and bytes through memory.
        floor: seconds they take at least, each under its nearer roof.
    """

    calls: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0


class OperationCounter(TorchDispatchMode):
    """Counts torch's and this package's operations inside the block, those of backward passes too.

    Only products count as floating-point operations, a multiplication and an addition as two; bytes are those
    of every input read once and every output written once. Operations that make a view or reserve memory do
    nothing and are left out.

    Args:
        ceilings: see `measure_ceilings`.

    Attributes:
        tallies: by `operation_name`.
    """

    def __init__(self, ceilings: dict[str, float]):
        super().__init__()
        self.ceilings = ceilings
        self.tallies: dict[str, Tally] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an operation and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if num_bytes := _moved_bytes(func, args, kwargs, out):
            name = func._schema.name
            formula = FLOP_FORMULAS.get(name) or flop_registry.get(func.overloadpacket)
            flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            tally = self.tallies.setdefault(operation_name(name), Tally())
            tally.calls += 1
            tally.flops += flops
            tally.bytes += num_bytes
            tally.floor += Cost(flops, num_bytes).floor(self._rate(args), self.ceilings["copy"])
        return out

    def _rate(self, args) -> float:
        """FLOP a second of the products of a call, which its first floating-point numbers decide."""
        found = next((x.dtype for x in _tensors(args) if x.is_floating_point()), torch.float32)
        name = "bf16" if found.itemsize == 2 else "float32"
        if found == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            name = "tf32"
        return self.ceilings.get(name, self.ceilings["float32"])


_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::uniform_"}
"""What does not read its first argument."""
_GATHERS = {"aten::index", "aten::index_select", "aten::gather", "aten::embedding"}
"""What reads no more of its first argument than it returns."""
_SCATTERS = {"aten::index_put_", "aten::index_add_", "aten::scatter_add_"}
"""What touches no more of its first argument than the others bring."""


def _moved_bytes(func, args, kwargs, out) -> int:
    """Bytes that a call reads and writes; 0 if it makes a view, or reserves memory alone."""
    schema, inputs = func._schema, _tensors((args, kwargs))
    if schema.name.startswith("aten::") and "empty" in schema.name:
        return 0
    given = dict(zip((spec.name for spec in schema.arguments), args, strict=False)) | kwargs
    changing = [spec.name for spec in schema.arguments if spec.alias_info and spec.alias_info.is_write]
    changed = _tensors([given[name] for name in changing if name in given])
    there = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    new = [result for result in _tensors(out) if result.untyped_storage().data_ptr() not in there]
    if not changed and not new and inputs:
        return 0
    read, written = sum(map(_nbytes, inputs)), sum(map(_nbytes, changed + new))
    first = _nbytes(inputs[0]) if inputs else 0
    if schema.name in _OVERWRITES:
        read -= first
    elif schema.name in _GATHERS:
        read -= max(first - written, 0)
    elif schema.name in _SCATTERS:
        untouched = max(2 * first - read, 0)
        read, written = read - untouched, written - untouched
    return read + written


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, with those that an expanded one repeats counted once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


RBF_TERMS = 13
"""Gaussians that reach one number."""


def _matrix_vector(*args, out_val) -> int:
    return 2 * next(x for x in args if x.dim() == 2).numel()


def _key_or_value(x, *_, out_val) -> int:
    """Both layers of one network, C → C, for every key of every edge."""
    return 2 * 2 * x.numel() * x.shape[2]


def _value_gradients(grad, grad_near, grad_pre, x, *_, out_val) -> int:
    """Two products for the second layer."""
    return 2 * 2 * x.numel() * x.shape[2]


def _key_gradients(grad_norm, grad_near, grad_pre, x, *_, out_val) -> int:
    """Two products for the second layer, and two for the first ones of both networks."""
    return 2 * (2 + 4) * x.numel() * x.shape[2]


def _rbf_embedding(x, weight, *_, out_val) -> int:
    return 2 * RBF_TERMS * x.numel() * weight.shape[0]


def _tensor_product(features, hidden, edge_vec, contraction, expansion, num_scalars, *_, out_val) -> int:
    """U features an edge times K hidden channels, contracted to or from scalars for each atom."""
    num_edges, channels = hidden.shape
    weights = (contraction.numel() + expansion.numel()) // (channels + 1)  # U · num_scalars
    return 2 * (num_edges + features.shape[0] * num_scalars) * channels * (weights // num_scalars)


def _rbf_embedding_backward(grad, out, *args, out_val) -> int:
    """Two products for each of the forward pass."""
    return 2 * _rbf_embedding(*args, out_val=out_val)


def _tensor_product_backward(grad, *args, out_val) -> int:
    return 2 * _tensor_product(*args, out_val=out_val)


FLOP_FORMULAS: dict[str, Callable] = {
    "aten::mv": _matrix_vector,
    "aten::addmv": _matrix_vector,
    "aten::addmm_": flop_registry[torch.ops.aten.addmm],
    "aten::baddbmm_": flop_registry[torch.ops.aten.baddbmm],
    "mgt_fast::gated_attention_keys": _key_or_value,
    "mgt_fast::gated_attention_values": _key_or_value,
    "mgt_fast::gated_attention_backward_values": _value_gradients,
    "mgt_fast::gated_attention_backward_keys": _key_gradients,
    "mgt_fast::rbf_embedding": _rbf_embedding,
    "mgt_fast::rbf_embedding_backward": _rbf_embedding_backward,
    "mgt_fast::tensor_product": _tensor_product,
    "mgt_fast::tensor_product_backward": _tensor_product_backward,
}
"""Products of operations that torch has no formula for, each counted once as the merged algebra asks."""
