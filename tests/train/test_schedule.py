import math

import pytest

from mgt_fast.train.schedule import BestTracker, warmup_cosine


def test_warmup_is_linear_and_cosine_falls_to_zero():
    factors = [warmup_cosine(step, 4, 12) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[6] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 0 < factors[11] < 0.05
    assert warmup_cosine(12, 4, 12) == pytest.approx(0, abs=1e-15)


def test_no_warmup_starts_at_the_top():
    assert [warmup_cosine(step, 0, 2) for step in range(2)] == [1.0, pytest.approx(0.5)]


def test_warmup_longer_than_the_run():
    assert [warmup_cosine(step, 10, 2) for step in range(2)] == [0.1, 0.2]


def test_best_is_any_improvement_and_patience_counts_real_ones():
    tracker = BestTracker(patience=2, min_delta=0.1)
    improved, exhausted = [], []
    for value in (1.0, 0.95, 0.7, 0.65, 0.8):
        improved.append(tracker.update(value))
        exhausted.append(tracker.exhausted)
    assert improved == [True, True, True, True, False]
    assert exhausted == [False, False, False, False, True]
    assert tracker.best == 0.65


def test_without_patience_it_never_ends():
    tracker = BestTracker()
    for _ in range(1000):
        tracker.update(1.0)
    assert not tracker.exhausted


def test_nan_is_no_improvement():
    assert not BestTracker().update(math.nan)
