"""The ranks of a run: the processes that torchrun starts, each of which takes a share of every batch.

A run of one process is one rank, for which every exchange is the identity. Tensors travel where they are
(NCCL on CUDA devices, Gloo on the CPU), objects and decisions by the CPU. Every sum runs in the same order at
every call, so a run that is repeated with as many ranks repeats itself bit for bit.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .profiling import span

START_UP = timedelta(minutes=30)
"""How long ranks wait for one another: the slowest may still be verifying its copy of a large dataset."""

_LOST = re.compile(r"gloo/|nccl|connection (closed|reset|refused)|broken pipe", re.IGNORECASE)


class RankError(RuntimeError):
    """Another rank failed or vanished; the message says which, or where to look."""


class Ranks:
    """The ranks of a run, seen from one of them.

    Attributes:
        rank: number of this one.
        size: how many there are.
        group: their process group; None for a single one.
    """

    def __init__(self):
        self.group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self.rank = dist.get_rank() if self.group else 0
        self.size = dist.get_world_size() if self.group else 1

    @classmethod
    def alone(cls) -> Ranks:
        """Return a single rank, whatever others there are."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.size = None, 0, 1
        return ranks

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Number and host of this rank, for messages."""
        return f"rank {self.rank} of {self.size} on {socket.gethostname()}"

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace a tensor by its sum over the ranks, the same bits on each."""
        if self.size > 1:
            with span("communication"):
                dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks; it is pickled, so it is to be small."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        with span("communication"):
            dist.all_gather_object(values, value)
        return values

    def total(self, values: list[float]) -> list[float]:
        """Add up some numbers over the ranks, on the CPU."""
        return self.sum_(torch.tensor(values, dtype=torch.float64)).tolist() if self.size > 1 else values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block on every rank; if it fails on any, it fails on all. The block must exchange nothing.

        Raises:
            RankError: on the ranks where the block succeeded, with the message of one where it failed.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(error)

    def in_step(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yield items while every rank has one; if making one fails on any rank, it fails on all."""
        items, end = iter(items), object()
        while True:
            item, error = end, None
            try:
                item = next(items, end)
            except Exception as caught:
                error = caught
            if self.total([float(error is not None)])[0]:
                self.agree(error)
            if item is end:
                return
            yield item

    def require_equal(self, values: Mapping[str, Any], what: str) -> None:
        """Check that every rank has the same values; all ranks must call this, and all raise.

        Raises:
            RankError: naming the first rank that differs from rank 0, and in what.
        """
        everyone = self.gather(dict(values))
        for rank, other in enumerate(everyone):
            keys = sorted(everyone[0].keys() | other.keys())
            differing = [key for key in keys if other.get(key) != everyone[0].get(key)]
            if differing:
                faults = (
                    f"{key} = {other.get(key)!r}, not {everyone[0].get(key)!r}" for key in differing[:5]
                )
                raise RankError(f"rank {rank} has another {what} than rank 0: {'; '.join(faults)}")

    def agree(self, error: Exception | None) -> None:
        """Raise `error`, or what another rank raises at the same time; all ranks must call this."""
        if self.size > 1:
            message = None if error is None else f"{self.name}: {error}"
            failed = [text for text in self.gather(message) if text is not None]
            if failed and error is None:
                raise RankError(failed[0])
        if error is not None:
            raise error


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """Join the ranks that torchrun started beside this one; without torchrun, be the only one.

    Args:
        device: what each rank computes on; of several CUDA devices a rank takes the one of its local number.

    Raises:
        RankError: if contact with another rank is lost on the way.
        ValueError: if there are fewer CUDA devices than ranks on this machine.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"rank {local} on {socket.gethostname()} has no CUDA device of its own, there are "
                f"{torch.cuda.device_count()}; start as many ranks as devices (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=START_UP)
    ranks = Ranks()
    try:
        yield ranks
    except RankError:
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise RankError(
                f"{ranks.name} lost contact with another rank, which was killed or failed (its own message "
                f"says why; {_first_line(error)}). Start the run again with --resume"
            ) from error
        raise
    dist.destroy_process_group()  # after a failure it could wait for ranks that are gone


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
