"""Rank statistics of one quantity against others: Spearman's correlation, Kruskal and Wallis' test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .statistics import CONFIDENCE, excludes_zero

FEWEST = 5
"""Values below which a group or a pair of columns is not tested."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of two columns.

    Attributes:
        rho, low, high: with its confidence interval; NaN where there are too few values or one column does
            not vary.
        p_value: of no correlation; NaN likewise.
        count: of pairs.
    """

    rho: float
    low: float
    high: float
    p_value: float
    count: int

    @property
    def resolved(self) -> bool:
        """Whether p value and interval both exclude that there is none."""
        return excludes_zero(self.p_value, self.low, self.high)


@dataclass(frozen=True)
class GroupTest:
    """Whether groups of values are distributed alike.

    Attributes:
        p_value: of no difference; NaN if there are not two groups to test, or all values are equal.
        effect: η² of the ranks, (H − k + 1) / (n − k) of k groups of n values, about 0 to 1; NaN likewise.

    Source: Tomczak and Tomczak, Trends Sport Sci. 21, 19 (2014), for the effect.
    """

    p_value: float
    effect: float


def spearman(x: np.ndarray, y: np.ndarray) -> Correlation:
    """Correlate the ranks of two columns, (n,) each, where both are finite.

    The interval is Fisher's, with the variance for ranks of Bonett and Wright; the p value is of one test.

    Source: Bonett and Wright, Psychometrika 65, 23 (2000).
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y, count = x[known], y[known], int(known.sum())
    if count < FEWEST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(math.nan, math.nan, math.nan, math.nan, count)
    result = stats.spearmanr(x, y)
    rho = float(np.clip(result.statistic, -1, 1))
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.sqrt((1 + rho**2 / 2) / (count - 3))
    with np.errstate(divide="ignore"):  # of a perfect correlation
        centre = np.arctanh(rho)
    return Correlation(
        rho, float(np.tanh(centre - half)), float(np.tanh(centre + half)), float(result.pvalue), count
    )


def kruskal_wallis(groups: Sequence[np.ndarray]) -> GroupTest:
    """Test groups of values; those of fewer than `FEWEST` are left out."""
    groups = [group for group in groups if len(group) >= FEWEST]
    if len(groups) < 2 or np.ptp(np.concatenate(groups)) == 0:
        return GroupTest(math.nan, math.nan)
    result = stats.kruskal(*groups)
    count = sum(map(len, groups))
    effect = (result.statistic - len(groups) + 1) / (count - len(groups))
    return GroupTest(float(result.pvalue), float(effect))
