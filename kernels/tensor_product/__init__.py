"""The equivariant encoder's two tensor products with mean aggregation, factored per atom."""

from __future__ import annotations

import torch

from ..launch import check_channels
from ..precision import accumulator_dtype, compute_dtype
from ..segments import Segments
from .reference import TensorProductShape, spherical_harmonics
from .reference import tensor_product_1 as tensor_product_1_reference
from .reference import tensor_product_2 as tensor_product_2_reference

__all__ = ["TensorProductShape", "spherical_harmonics", "tensor_product_1", "tensor_product_2"]


def tensor_product_1(
    node: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: TensorProductShape,
    receiver: Segments,
    sender: Segments,
    *,
    backend: str = "torch",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean over an atom's edges of TP1: scalars ⊗ (1, Y_1, Y_2) → scalars, l = 1 and l = 2 features.

    See `reference.tensor_product_1` for the arguments. With Triton the result is bfloat16 under autocast.

    Raises:
        ValueError: with Triton for a number of hidden channels that is no power of two from 16 to 512.
    """
    arguments = (node, hidden, edge_vec, weight, bias, shape, receiver, sender)
    if backend == "torch":
        return tensor_product_1_reference(*arguments)
    ns, nv = shape.num_scalars, shape.num_vectors
    scalars, vectors = (_with_bias(weight, bias) * ns**-0.5).split((ns * ns, 2 * ns * nv))
    contraction = scalars.view(ns, ns, -1).permute(2, 0, 1).flatten(0, 1)
    expansion = vectors.view(2, ns, nv, -1).permute(1, 3, 0, 2).flatten(1)  # [ns, (K + 1)·2nv]
    mean = _mean_product(node, hidden, edge_vec, contraction, expansion, ns, receiver, sender)
    scalars, first, second = mean.split((ns, 3 * nv, 5 * nv), dim=1)
    return scalars, first.unflatten(1, (nv, 3)), second.unflatten(1, (nv, 5))


def tensor_product_2(
    node: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: TensorProductShape,
    receiver: Segments,
    sender: Segments,
    *,
    backend: str = "torch",
) -> torch.Tensor:
    """Mean over an atom's edges of TP2: (0, 1, 2) ⊗ (0, 1, 2) → scalars.

    See `reference.tensor_product_2` for the arguments. With Triton the result is bfloat16 under autocast.

    Raises:
        ValueError: with Triton for a number of hidden channels that is no power of two from 16 to 512.
    """
    arguments = (node, hidden, edge_vec, weight, bias, shape, receiver, sender)
    if backend == "torch":
        return tensor_product_2_reference(*arguments)
    ns, nv = shape.num_scalars, shape.num_vectors
    paths = _with_bias(weight, bias).split((ns * ns, nv * ns, nv * ns))
    norm = ns + 2 * nv
    scaled = torch.cat(
        [path * (norm * degree) ** -0.5 for path, degree in zip(paths, (1, 3, 5), strict=True)]
    )
    contraction = scaled.view(norm, ns, -1).permute(2, 0, 1).flatten(0, 1)  # [(K + 1)·(ns + 2nv), ns]
    features = torch.cat([part.flatten(1) for part in node], dim=1)
    expansion = contraction.new_empty(ns, 0)
    return _mean_product(features, hidden, edge_vec, contraction, expansion, ns, receiver, sender)


def _with_bias(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Append the bias as the weights of one more hidden channel, which is 1."""
    return torch.cat((weight, bias[:, None]), dim=1)


def _mean_product(
    features: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    contraction: torch.Tensor,
    expansion: torch.Tensor,
    num_scalars: int,
    receiver: Segments,
    sender: Segments,
) -> torch.Tensor:
    """Mean over each receiver's edges of contraction and expansion; see `triton.forward`."""
    check_channels(hidden.shape[1], "hidden channels")
    dtype = compute_dtype(hidden)
    wide = accumulator_dtype(dtype)
    total = _tensor_product(
        features.to(dtype).contiguous(),
        hidden.to(dtype).contiguous(),
        edge_vec.to(wide).contiguous(),
        contraction.to(dtype).contiguous(),
        expansion.to(dtype).contiguous(),
        num_scalars,
        receiver.order,
        receiver.ptr,
        receiver.index,
        sender.order,
        sender.ptr,
        sender.index,
    )
    return (total / receiver.count.clamp(min=1).to(wide)[:, None]).to(dtype)


@torch.library.custom_op("mgt_fast::tensor_product", mutates_args=())
def _tensor_product(
    features: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    contraction: torch.Tensor,
    expansion: torch.Tensor,
    num_scalars: int,
    receiver_order: torch.Tensor,
    receiver_ptr: torch.Tensor,
    receiver: torch.Tensor,
    sender_order: torch.Tensor,
    sender_ptr: torch.Tensor,
    sender: torch.Tensor,
) -> torch.Tensor:
    from .triton import Edges, forward

    receivers = Edges(receiver_order, receiver_ptr, sender)
    senders = Edges(sender_order, sender_ptr, receiver)
    return forward(features, hidden, edge_vec, contraction, expansion, num_scalars, receivers, senders)


@_tensor_product.register_fake
def _(features, hidden, edge_vec, contraction, expansion, *_):
    vectors = expansion.shape[1] // (2 * hidden.shape[1] + 2)
    return features.new_empty(features.shape[0], contraction.shape[1] + 8 * vectors)


@torch.library.custom_op("mgt_fast::tensor_product_backward", mutates_args=())
def _tensor_product_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    contraction: torch.Tensor,
    expansion: torch.Tensor,
    num_scalars: int,
    receiver_order: torch.Tensor,
    receiver_ptr: torch.Tensor,
    receiver: torch.Tensor,
    sender_order: torch.Tensor,
    sender_ptr: torch.Tensor,
    sender: torch.Tensor,
    wants_edge_vec: bool,
) -> list[torch.Tensor]:
    """Return the gradients of features, hidden, contraction, expansion, and of edge_vec if wanted."""
    from .triton import Edges, backward

    receivers = Edges(receiver_order, receiver_ptr, sender)
    senders = Edges(sender_order, sender_ptr, receiver)
    inputs = (features, hidden, edge_vec, contraction, expansion, num_scalars)
    return backward(grad, *inputs, receivers, senders, wants_edge_vec)


@_tensor_product_backward.register_fake
def _(grad, features, hidden, edge_vec, contraction, expansion, *others):
    like = [features, hidden, contraction, expansion] + [edge_vec] * others[-1]
    return [torch.empty_like(tensor) for tensor in like]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))
    ctx.num_scalars = inputs[5]


def _backward(ctx, grad):
    *inputs, order, ptr, receiver, sender_order, sender_ptr, sender = ctx.saved_tensors
    segments = (order, ptr, receiver, sender_order, sender_ptr, sender)
    wants_edge_vec = ctx.needs_input_grad[2]
    features, hidden, contraction, expansion, *edge_vec = _tensor_product_backward(
        grad, *inputs, ctx.num_scalars, *segments, wants_edge_vec
    )
    edge_vec = edge_vec[0] if wants_edge_vec else None
    return features, hidden, edge_vec, contraction, expansion, *[None] * 7


_tensor_product.register_autograd(_backward, setup_context=_setup_context)
