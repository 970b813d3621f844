"""Statistics of studies: spread over seeds, and paired comparisons that say whether they resolve anything.

A difference of two networks has two sources of chance: the seeds (weights, order of the crystals) and the
crystals that happen to be in the test part. A comparison looks at both, each time in pairs, since both arms
have the same seeds and are scored on the same crystals; and it corrects for how many comparisons are made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999
UNRESOLVED = "not resolved"
CORRECTION = (
    "± is the half-width of a 95 % confidence interval over seeds (Student's t, paired). Two p values: a "
    "paired t-test over seeds, and Wilcoxon's signed-rank test over crystals, whose errors are averaged over "
    "seeds; each is corrected for the number of comparisons by Holm's method. A difference is resolved only "
    "if seeds and crystals both exclude that there is none."
)
"""How a report explains its comparisons."""

Errors = Mapping[str, float]
"""Absolute error of each crystal, by its id."""


@dataclass(frozen=True)
class Summary:
    """Some values of one quantity, one a seed.

    Attributes:
        mean, sd: of the values; sd with n − 1, NaN for one value.
        low, high: confidence interval of the mean by Student's t; NaN for one value.
        count: of values.
    """

    mean: float
    sd: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class PairedTest:
    """Whether paired differences have a mean other than 0.

    Attributes:
        difference: their mean.
        low, high: its confidence interval; NaN for fewer than two pairs.
        p_value: of no difference; NaN for fewer than two pairs.
        count: of pairs.
    """

    difference: float
    low: float
    high: float
    p_value: float
    count: int

    @property
    def resolved(self) -> bool:
        """Whether p value and interval both exclude that there is no difference."""
        return excludes_zero(self.p_value, self.low, self.high)


@dataclass(frozen=True)
class Comparison:
    """The errors of one arm of a study against those of another, its baseline.

    Attributes:
        name, baseline: of the arms.
        seeds: differences of the MAE (arm − baseline), a pair a seed; paired t-test.
        crystals: differences of absolute errors, averaged over seeds, a pair a crystal; Wilcoxon's
            signed-rank test, interval of the mean by bootstrap.
    """

    name: str
    baseline: str
    seeds: PairedTest
    crystals: PairedTest

    @property
    def verdict(self) -> str:
        """Return "better", "worse", or "not resolved" unless seeds and crystals both tell, and agree."""
        both = self.seeds.resolved and self.crystals.resolved
        if not both or self.seeds.difference * self.crystals.difference <= 0:
            return UNRESOLVED
        return "better" if self.seeds.difference < 0 else "worse"

    def columns(self) -> dict[str, float | str]:
        """Return what a table shows of it: difference, margin (half the interval), p values, verdict."""
        return {
            "difference": self.seeds.difference,
            "margin": (self.seeds.high - self.seeds.low) / 2,
            "p_seeds": self.seeds.p_value,
            "p_crystals": self.crystals.p_value,
            "verdict": self.verdict,
        }

    def sentence(self, unit: str | None = None) -> str:
        """Say what the comparison found, with all its figures."""
        seeds, suffix = self.seeds, f" {unit}" if unit else ""
        word = "lower" if seeds.difference < 0 else "higher"
        number = f"{abs(seeds.difference):.3g}{suffix}"
        if seeds.count < 2:
            return (
                f"{self.name}: MAE {word} than with {self.baseline} by {number} for the only seed: "
                f"{UNRESOLVED}; run more seeds"
            )
        plus_minus = (seeds.high - seeds.low) / 2
        return (
            f"{self.name}: MAE {word} than with {self.baseline} by {abs(seeds.difference):.3g} ± "
            f"{plus_minus:.2g}{suffix} (n = {seeds.count} seeds, p = {seeds.p_value:.2g}; "
            f"{self.crystals.count} crystals, p = {self.crystals.p_value:.2g}): {self.verdict}"
        )


def excludes_zero(p_value: float, low: float, high: float) -> bool:
    """Say whether a p value and a confidence interval both exclude 0; NaN excludes nothing."""
    return p_value < 1 - CONFIDENCE and (low > 0 or high < 0)


def summarize(values: Sequence[float]) -> Summary:
    """Return mean, standard deviation and confidence interval; there must be at least one value."""
    values = np.asarray(values, np.float64)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Summary(mean, math.nan, math.nan, math.nan, count)
    sd = float(values.std(ddof=1))
    half = _t_quantile(count) * sd / math.sqrt(count)
    return Summary(mean, sd, mean - half, mean + half, count)


def over_seeds(differences: Sequence[float]) -> PairedTest:
    """Test paired differences, one a seed, by Student's t."""
    found = summarize(differences)
    if found.count < 2:
        return PairedTest(found.mean, math.nan, math.nan, math.nan, found.count)
    if found.sd == 0:
        p_value = float(found.mean == 0)
    else:
        t = found.mean / (found.sd / math.sqrt(found.count))
        p_value = float(2 * stats.t.sf(abs(t), found.count - 1))
    return PairedTest(found.mean, found.low, found.high, p_value, found.count)


def over_crystals(differences: Sequence[float], seed: int = 0) -> PairedTest:
    """Test paired differences, one a crystal, which are far from normal: Wilcoxon, and bootstrap of the mean.

    Args:
        differences: (n,), n at least 1.
        seed: of the bootstrap.
    """
    differences = np.asarray(differences, np.float64)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return PairedTest(mean, math.nan, math.nan, math.nan, count)
    if not differences.any():
        return PairedTest(mean, 0.0, 0.0, 1.0, count)
    interval = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // count),  # 32 MiB
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    p_value = float(stats.wilcoxon(differences).pvalue)
    return PairedTest(mean, float(interval.low), float(interval.high), p_value, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values of several comparisons, so that one false find in all stays as rare as in one.

    NaN (no test) stays NaN and does not count.

    Source: Holm, Scand. J. Statist. 6, 65 (1979).
    """
    adjusted = list(map(float, p_values))
    order = sorted((i for i, p in enumerate(adjusted) if not math.isnan(p)), key=adjusted.__getitem__)
    largest = 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * adjusted[i]))
        adjusted[i] = largest
    return adjusted


def compare(
    arms: Sequence[tuple[str, Mapping[int, Errors]]],
    baselines: Sequence[tuple[str, Mapping[int, Errors]]],
) -> list[Comparison]:
    """Compare arms with their baselines, as one family of comparisons (Holm's correction).

    Args:
        arms: name of each arm, and its crystals' absolute errors by seed.
        baselines: the same of what each arm is compared with.

    Raises:
        ValueError: if two arms share no seed, or were scored on different crystals with the same seed.
    """
    found = []
    for (name, errors), (baseline, base_errors) in zip(arms, baselines, strict=True):
        seeds = sorted(errors.keys() & base_errors.keys())
        if not seeds:
            raise ValueError(
                f"{name} ran with seeds {sorted(errors)} and {baseline} with {sorted(base_errors)}; they can "
                "only be compared seed by seed"
            )
        of_seeds, of_crystals = [], {}
        for seed in seeds:
            ids = errors[seed].keys()
            if ids != base_errors[seed].keys():
                raise ValueError(f"seed {seed}: {name} and {baseline} were scored on different crystals")
            differences = {crystal: errors[seed][crystal] - base_errors[seed][crystal] for crystal in ids}
            of_seeds.append(float(np.mean(list(differences.values()))))
            for crystal, difference in differences.items():
                of_crystals.setdefault(crystal, []).append(difference)
        means = [float(np.mean(of_crystals[crystal])) for crystal in sorted(of_crystals)]
        found.append(Comparison(name, baseline, over_seeds(of_seeds), over_crystals(means)))
    seeds_p = holm([one.seeds.p_value for one in found])
    crystals_p = holm([one.crystals.p_value for one in found])
    return [
        replace(one, seeds=replace(one.seeds, p_value=p), crystals=replace(one.crystals, p_value=crystal_p))
        for one, p, crystal_p in zip(found, seeds_p, crystals_p, strict=True)
    ]


def _t_quantile(count: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
