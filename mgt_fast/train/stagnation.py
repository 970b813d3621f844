"""Watching the router of a fine-tuning run: shares of the views that stay even, or with one view.

A view's share is the size of its term in the final linear map (`model.MixtureOfExperts`). A router that works
gives crystals different shares. It stagnates when all crystals get the same even share, or when one view has
nearly all of every prediction, and stays there: the network then pays for two views and a router, and uses
one view, or a fixed mean of two.

The monitor keeps nothing: it looks at the run's records, which a resumed run has as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .config import RouterMonitorConfig

MEAN, SPREAD, ONE_VIEW = "val_so3_share", "val_so3_share_std", "val_one_view"
EVEN, SE3, SO3 = "even", "se3", "so3"  # where a router can stagnate
_VIEWS = {SE3: "SE(3)", SO3: "SO(3)"}


def share_figures(contributions: np.ndarray, monitor: RouterMonitorConfig) -> dict[str, float]:
    """Return the figures of an epoch that the monitor looks at.

    Args:
        contributions: shares of the SE(3) and the SO(3) view, (n, 2), rows sum to 1.
        monitor: says from which share on a prediction counts as one view's.

    Returns:
        Mean and standard deviation of the SO(3) view's share, and the share of crystals at one view.
    """
    so3 = contributions[:, 1]
    return {
        MEAN: float(so3.mean()),
        SPREAD: float(so3.std()),
        ONE_VIEW: float((contributions.max(axis=1) >= monitor.one_view).mean()),
    }


def stagnation(records: Sequence[Mapping[str, float]], monitor: RouterMonitorConfig) -> str | None:
    """Return a warning if an episode of stagnation has just lasted `monitor.epochs`, once an episode.

    Args:
        records: of all epochs so far, oldest first; those without the router's figures end an episode.
        monitor: what counts as stagnation.

    Returns:
        The warning with its figures and what can be done, or None.
    """
    if monitor.epochs is None or not records:
        return None
    state, length = router_state(records[-1], monitor), 0
    while length < len(records) and router_state(records[-1 - length], monitor) == state:
        length += 1
    if state is None or length != monitor.epochs:
        return None
    return _warning(state, records[-1], monitor)


def router_state(record: Mapping[str, float], monitor: RouterMonitorConfig) -> str | None:
    """Return where the router stagnates by an epoch's figures: EVEN, SE3, SO3, or None (well, or absent)."""
    if MEAN not in record:
        return None
    mean = record[MEAN]
    if mean >= monitor.one_view:
        return SO3
    if 1 - mean >= monitor.one_view:
        return SE3
    even = abs(mean - 0.5) <= monitor.even and record[SPREAD] <= monitor.spread
    return EVEN if even else None


def _warning(state: str, record: Mapping[str, float], monitor: RouterMonitorConfig) -> str:
    figures = (
        f"share of the SO(3) view {record[MEAN]:.3f} ± {record[SPREAD]:.3f} over the val crystals, "
        f"{record[ONE_VIEW]:.0%} of them at one view"
    )
    epochs = f"for {monitor.epochs} epochs" if monitor.epochs > 1 else "in this epoch"
    if state == EVEN:
        what = "all crystals have got the same, even shares"
        remedy = (
            "The router does not tell crystals apart, so model.fusion=concat may do as well; a larger "
            "optim.lr or another seed may set it going"
        )
    else:
        what = f"nearly all of every prediction has come from the {_VIEWS[state]} view"
        remedy = (
            f"If model.views={state} alone does as well (mgt-fast ablate compares them), it saves the other "
            "encoder; otherwise model.fusion=concat uses both views, and a larger optim.lr may bring the "
            "other one back"
        )
    return f"warning: epoch {record['epoch']}: the router stagnates: {epochs} {what} ({figures}). {remedy}"
