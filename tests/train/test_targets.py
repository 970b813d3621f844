import numpy as np
import pytest
import torch

from mgt_fast.train.targets import TargetScaling, errors, trivial_errors


def test_scaling_round_trip():
    values = np.array([1.0, 2.0, 4.0, -3.0])
    scaling = TargetScaling.fit(values)
    scaled = scaling.scale(values)
    assert scaled.mean() == pytest.approx(0, abs=1e-12)
    assert scaled.std() == pytest.approx(1)
    np.testing.assert_allclose(scaling.unscale(scaled), values)
    torch.testing.assert_close(scaling.unscale(torch.from_numpy(scaled)), torch.from_numpy(values))


def test_default_scaling_changes_nothing():
    values = np.array([1.0, 7.0])
    np.testing.assert_array_equal(TargetScaling().scale(values), values)


def test_constant_targets_are_refused():
    with pytest.raises(ValueError, match=r"all 3 training targets equal 2\.5"):
        TargetScaling.fit(np.full(3, 2.5))


def test_errors():
    found = errors(np.array([0.0, 0.0, 3.0]), np.array([1.0, -1.0, 7.0]))
    assert found == {"mae": pytest.approx(2.0), "rmse": pytest.approx(np.sqrt(6)), "count": 3}


def test_trivial_predictors_use_training_targets():
    found = trivial_errors(np.array([1.0, 3.0]), np.array([0.0, 0.0, 6.0]))
    assert found["mean"]["mae"] == pytest.approx(1.0)
    assert found["median"]["mae"] == pytest.approx(2.0)
