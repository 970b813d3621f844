"""Statistics of batches that no norm sees as a whole: spread over ranks, or worked on chunk by chunk.

A norm without `statistics` normalises the rows of one call by themselves. `RankStatistics` joins the rows of
all ranks, at the cost of one collective a norm in each direction. `ChunkStatistics` joins chunks that are
worked on one after the other with the memory of one, on one rank or on many: what a norm finds depends on the
norms before it, so passes are repeated until nothing changes any more. It is exact and slow, the last resort
where a batch fits in no other way:

    with ChunkStatistics(model, group) as statistics:
        with torch.no_grad():
            for _ in statistics.forward_sweeps():  # the last one computes with the whole batch's statistics
                pools = [model(chunk).pool for chunk in chunks]
        grads = gradient_of_the_whole_loss(pools)  # of a loss that couples chunks, by what each chunk gives
        for _ in statistics.backward_sweeps():  # the last one leaves the right gradients
            optimizer.zero_grad()
            for chunk, grad in zip(chunks, grads):
                model(chunk).pool.backward(grad)

Every rank runs the same sweeps, whatever its number of chunks, zero included. With D norms one behind the
other there are D + 1 sweeps forward and as many backward. A chunk must give the same numbers for the same
statistics, bit for bit, in every sweep; dropout must therefore not draw anew.

Moments are merged as in Chan, Golub, LeVeque (1979), in float64 and in the order of chunks and ranks, so two
runs, and all ranks of one, hold the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..profiling import span
from .batch_norm import BatchNorm, Moments, Statistics

__all__ = ["ChunkStatistics", "Moments", "RankStatistics", "Statistics", "set_statistics"]


def norms_of(model: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm of a network, in a fixed order."""
    return [module for module in model.modules() if isinstance(module, BatchNorm)]


def set_statistics(model: nn.Module, statistics: Statistics | None):
    """Let every BatchNorm of a network join its rows with others in this way; None: with none."""
    for norm in norms_of(model):
        norm.statistics = statistics


class RankStatistics:
    """Statistics over the rows of all ranks of a process group.

    Every rank must call the network the same number of times, forward and backward, even with no rows: each
    norm waits for all ranks. Nothing waits for the device, so that steps can be captured. Gradients of the
    norms' weights and biases are those of own rows, as those of all other parameters are.

    Args:
        group: the ranks; None: all of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group

    def forward(self, norm: BatchNorm, own: Moments) -> Moments:
        """Merge moments over the ranks; one all-gather of 2C + 1 numbers.

        Raises:
            ValueError: if all ranks together have fewer than two rows; on a GPU its own assertion fails.
        """
        merged = _unpacked(_merge(_gathered(_packed(own), self.group)), own.mean.dtype)
        _require_two(merged.count)
        norm.move(merged)
        return merged

    def backward(self, norm: BatchNorm, sums: torch.Tensor) -> torch.Tensor:
        """Add sums over the ranks; one all-gather of 2C numbers."""
        parts = _gathered(sums.double().flatten(), self.group)
        return parts.sum(0).view_as(sums).to(sums.dtype)


class ChunkStatistics:
    """Statistics over chunks that are worked on one after the other; see the head of this file.

    A context: inside it the network's norms join their rows in this way, at its end the running statistics
    move, once, towards what was found.

    Args:
        model: the network, in training.
        group: ranks that work on chunks of the same batch; None: this process alone.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None):
        self.group = group
        self.norms = norms_of(model)
        self._place = {norm: place for place, norm in enumerate(self.norms)}
        self._direction: str | None = None
        self._found: list[torch.Tensor] = []  # in this sweep, by norm
        self._known: dict[str, list[torch.Tensor]] = {}  # from the sweep before, by norm

    def __enter__(self) -> ChunkStatistics:
        self._before = [norm.statistics for norm in self.norms]
        for norm in self.norms:
            norm.statistics = self
        return self

    def __exit__(self, error: type | None, *_):
        for norm, before in zip(self.norms, self._before, strict=True):
            norm.statistics = before
        if error is None:
            for norm, found in zip(self.norms, self._known.get("forward", ()), strict=False):
                if found[0] >= 2:
                    norm.move(_unpacked(found, norm.weight.dtype))

    def forward_sweeps(self) -> Iterator[None]:
        """Yield as often as all chunks must be passed through the network, best without gradient.

        Raises:
            ValueError: if all chunks together have a single row.
            RuntimeError: if the statistics do not settle, because a chunk gives other numbers each time.
        """
        yield from self._sweeps("forward")
        for found in self._known["forward"]:
            if found[0] == 1:
                _require_two(found[0])

    def backward_sweeps(self) -> Iterator[None]:
        """Yield as often as all chunks must be passed forward and backward; the last gradients are right.

        Raises:
            RuntimeError: before `forward_sweeps` has ended; if the gradients' sums do not settle.
        """
        if "forward" not in self._known:
            raise RuntimeError("no statistics yet: go through forward_sweeps() first")
        yield from self._sweeps("backward")

    def forward(self, norm: BatchNorm, own: Moments) -> Moments:
        """Return what the sweep before found, or where there was none what this chunk has."""
        if self._direction is None:
            raise RuntimeError("with statistics over chunks the network is trained inside a sweep alone")
        found = _packed(own)
        if self._direction == "forward":
            self._add(norm, found)
        if "forward" in self._known:
            return _unpacked(self._known["forward"][self._place[norm]], own.mean.dtype)
        return own._replace(var=own.var.where(found[0] > 0, 1))

    def backward(self, norm: BatchNorm, sums: torch.Tensor) -> torch.Tensor:
        """Return what the sweep before found, or zeros."""
        self._add(norm, sums.double().flatten())
        if "backward" not in self._known:
            return torch.zeros_like(sums)
        return self._known["backward"][self._place[norm]].view_as(sums).to(sums.dtype)

    def _add(self, norm: BatchNorm, new: torch.Tensor):
        place = self._place[norm]
        self._found[place] = _JOIN[self._direction](torch.stack((self._found[place], new)))

    def _sweeps(self, direction: str) -> Iterator[None]:
        sizes = [2 * norm.num_features + (direction == "forward") for norm in self.norms]
        self._known.pop(direction, None)
        before = None
        for _ in range(len(self.norms) + 2):
            self._found = [
                torch.zeros(size, dtype=torch.float64, device=norm.weight.device)
                for size, norm in zip(sizes, self.norms, strict=True)
            ]
            self._direction = direction
            try:
                yield
            finally:
                self._direction = None
            parts = torch.cat(self._found)[None]
            if self.group is not None:
                parts = _gathered(parts[0], self.group)
            found = [_JOIN[direction](part) for part in parts.split(sizes, dim=1)]
            after = torch.cat(found).view(torch.int64)  # bits: two NaN are equal
            if before is not None and torch.equal(before, after):
                return
            before, self._known[direction] = after, found
        raise RuntimeError(
            f"the {direction} statistics still change after {len(self.norms) + 2} sweeps: a chunk gives "
            "other numbers each time; look for dropout that draws anew and for kernels that are not "
            "deterministic"
        )


def _gathered(own: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Everyone's numbers (n,) in the order of ranks, (P, n)."""
    size = dist.get_world_size(group)
    parts = own.new_empty(size * own.shape[0])
    new_name = hasattr(dist, "all_gather_single")  # since torch 2.13
    gather = dist.all_gather_single if new_name else dist.all_gather_into_tensor
    with span("communication"):
        gather(parts, own, group=group)
    return parts.view(size, -1)


def _packed(own: Moments) -> torch.Tensor:
    """Count, mean and variance as one row of float64, (2C + 1,)."""
    mean = own.mean.double()
    count = own.count if isinstance(own.count, torch.Tensor) else mean.new_full((), own.count)
    return torch.cat((count.to(mean.dtype)[None], mean, own.var.double()))


def _unpacked(packed: torch.Tensor, dtype: torch.dtype) -> Moments:
    mean, var = packed[1:].to(dtype).chunk(2)
    return Moments(packed[0], mean, var)


def _merge(parts: torch.Tensor) -> torch.Tensor:
    """Merge packed moments, (P, 2C + 1) → (2C + 1,)."""
    count, (means, variances) = parts[:, :1], parts[:, 1:].chunk(2, dim=1)
    total = count.sum(0)
    share = count / total.clamp(min=1)
    mean = (share * means).sum(0)
    return torch.cat((total, mean, (share * (variances + (means - mean).square())).sum(0)))


_JOIN = {"forward": _merge, "backward": lambda parts: parts.sum(0)}


def _require_two(count: torch.Tensor):
    """Raise if so few rows have no statistics; where the count cannot be read, the device does."""
    if count.device.type != "cpu":
        torch._assert_async(count >= 2, "batch statistics need at least 2 rows")
    elif count < 2:
        raise ValueError(f"batch statistics need at least 2 rows, got {int(count)} in the whole batch")
