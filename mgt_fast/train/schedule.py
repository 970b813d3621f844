"""The learning rate over a run, and when to stop it early."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the learning rate of a step as a fraction of the largest one.

    The first step gets 1/warmup_steps, step `warmup_steps - 1` the largest rate; from there a half cosine
    falls to zero at `total_steps`, which is never reached, so that every step learns.

    Args:
        step: steps taken before this one.
        warmup_steps: length of the linear warm-up; 0 for none.
        total_steps: length of the run.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class BestTracker:
    """Keeps the best value of a metric that should fall, and says when waiting for a better one is over.

    Attributes:
        patience: epochs without a gain of more than `min_delta` after which `exhausted` turns true; None
            waits for ever.
        min_delta: gain below which an epoch counts as stale.
        best: smallest value so far.
    """

    patience: int | None = None
    min_delta: float = 0.0
    best: float = field(default=math.inf, init=False)
    stale: int = field(default=0, init=False)
    _reference: float = field(default=math.inf, init=False)

    def state(self) -> dict[str, float]:
        """Return what `restore` takes."""
        return {"best": self.best, "stale": self.stale, "reference": self._reference}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from another tracker's `state`."""
        self.best, self.stale, self._reference = state["best"], int(state["stale"]), state["reference"]

    def update(self, value: float) -> bool:
        """Take in an epoch's value; return whether it is the best so far."""
        improved = value < self.best
        self.best = min(self.best, value)
        if value < self._reference - self.min_delta:
            self._reference, self.stale = value, 0
        else:
            self.stale += 1
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs went by without a gain."""
        return self.patience is not None and self.stale >= self.patience
