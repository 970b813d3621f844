import numpy as np
import pytest
import torch

from mgt_fast.target_scaling import TRANSFORMS, TargetScaling


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_scaling_round_trip(transform):
    values = np.array([1.0, 2.0, 4.0, 300.0])
    scaling = TargetScaling.fit(values, transform)
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


def test_logarithms_are_scaled():
    scaling = TargetScaling.fit(np.exp([1.0, 3.0]), "log")
    assert (scaling.mean, scaling.std) == (pytest.approx(2), pytest.approx(1))
    assert scaling.unscale(0.5) == pytest.approx(np.exp(2.5))
