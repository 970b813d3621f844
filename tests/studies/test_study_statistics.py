import math

import numpy as np
import pytest
from scipy import stats

from mgt_fast.studies.statistics import (
    UNRESOLVED,
    compare,
    holm,
    over_crystals,
    over_seeds,
    summarize,
)


def arm(rng, shift=0.0, seeds=5, crystals=60, noise=0.01):
    """Absolute errors by seed and crystal, which are alike between arms up to noise and a shift."""
    base = np.random.default_rng(0).exponential(0.1, crystals)
    return {
        seed: {f"c{i}": float(abs(base[i] + shift + rng.normal(0, noise))) for i in range(crystals)}
        for seed in range(seeds)
    }


def test_summary_has_the_interval_of_student():
    values = [1.0, 2.0, 4.0, 5.0]
    found = summarize(values)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.count) == (3.0, 4)
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    alone = summarize([2.0])
    assert alone.mean == 2.0
    assert all(math.isnan(value) for value in (alone.sd, alone.low, alone.high))


def test_differences_over_seeds_as_the_paired_t_test_says():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=6), rng.normal(0.5, 1, 6)
    found, expected = over_seeds(a - b), stats.ttest_rel(a, b)
    assert found.p_value == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_equal_differences_need_no_division_by_zero():
    assert over_seeds([0.0, 0.0]).p_value == 1
    assert over_seeds([0.5, 0.5]).p_value == 0
    none = over_crystals(np.zeros(5))
    assert (none.p_value, none.low, none.high, none.resolved) == (1, 0, 0, False)
    assert math.isnan(over_crystals([0.3]).p_value)


def test_bootstrap_agrees_with_the_normal_interval_where_that_holds():
    values = np.random.default_rng(2).normal(0.3, 1, 2000)
    found = over_crystals(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)
    assert found == over_crystals(values)  # the same draw every time
    assert found.resolved


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([math.nan, 0.02, 0.9])
    assert math.isnan(adjusted[0])
    assert adjusted[1:] == pytest.approx([0.04, 0.9])


def test_holm_keeps_false_finds_rare():
    """Without a difference anywhere, one of ten comparisons resolves in about 5 % of studies."""
    rng = np.random.default_rng(3)
    finds = sum(
        min(holm([over_seeds(rng.normal(size=5)).p_value for _ in range(10)])) < 0.05 for _ in range(400)
    )
    assert 5 <= finds <= 35


def test_a_real_difference_is_found_and_no_other():
    rng = np.random.default_rng(4)
    base, worse, same = arm(rng), arm(rng, shift=0.05), arm(rng)
    found = compare([("worse", worse), ("same", same)], [("base", base)] * 2)
    assert [one.verdict for one in found] == ["worse", UNRESOLVED]
    assert found[0].seeds.difference == pytest.approx(0.05, abs=0.005)
    assert found[0].crystals.difference == pytest.approx(found[0].seeds.difference)
    assert compare([("base", base)], [("worse", worse)])[0].verdict == "better"
    sentence = found[0].sentence("eV")
    assert sentence.startswith("worse: MAE higher than with base by 0.0479 ± 0.0028 eV (n = 5")
    assert sentence.endswith("): worse")
    assert "n = 5 seeds" in sentence
    assert "60 crystals" in sentence


def test_seeds_that_disagree_resolve_nothing_however_many_the_crystals():
    rng = np.random.default_rng(5)
    base = arm(rng, crystals=500)
    mixed = {seed: arm(rng, shift=0.05 * (-1) ** seed, crystals=500)[seed] for seed in base}
    (found,) = compare([("mixed", mixed)], [("base", base)])
    assert found.crystals.p_value < 0.01
    assert found.verdict == UNRESOLVED


def test_a_few_crystals_resolve_nothing_however_alike_the_seeds():
    base = {seed: {"a": 0.1, "b": 0.2, "c": 0.3} for seed in range(5)}
    other = {seed: {"a": 0.2, "b": 0.1, "c": 0.6 + 0.001 * seed} for seed in range(5)}
    (found,) = compare([("other", other)], [("base", base)])
    assert found.seeds.resolved
    assert found.verdict == UNRESOLVED


def test_one_seed_resolves_nothing():
    rng = np.random.default_rng(6)
    (found,) = compare([("a", arm(rng, seeds=1, shift=1))], [("b", arm(rng, seeds=1))])
    assert found.verdict == UNRESOLVED
    assert "only seed" in found.sentence()
    assert "run more seeds" in found.sentence()


def test_arms_are_compared_on_the_same_crystals_and_seeds():
    with pytest.raises(ValueError, match="seed 0: a and b were scored on different crystals"):
        compare([("a", {0: {"x": 1.0}})], [("b", {0: {"y": 1.0}})])
    with pytest.raises(ValueError, match=r"a ran with seeds \[0\] and b with \[1\]"):
        compare([("a", {0: {"x": 1.0}})], [("b", {1: {"x": 1.0}})])


def test_crystals_of_several_parts_count_once():
    """Where each seed tests other crystals, a crystal's difference is its mean over the seeds it was in."""
    a = {0: {"x": 2.0, "y": 1.0}, 1: {"y": 3.0, "z": 1.0}}
    b = {0: {"x": 1.0, "y": 1.0}, 1: {"y": 1.0, "z": 1.0}}
    (found,) = compare([("a", a)], [("b", b)])
    assert found.crystals.count == 3
    assert found.crystals.difference == pytest.approx((1 + 1 + 0) / 3)
