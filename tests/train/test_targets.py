import numpy as np
import pytest

from mgt_fast.train.targets import errors, trivial_errors


def test_errors():
    found = errors(np.array([0.0, 0.0, 3.0]), np.array([1.0, -1.0, 7.0]))
    assert found == {"mae": pytest.approx(2.0), "rmse": pytest.approx(np.sqrt(6)), "count": 3}


def test_trivial_predictors_use_training_targets():
    found = trivial_errors(np.array([1.0, 3.0]), np.array([0.0, 0.0, 6.0]))
    assert found["mean"]["mae"] == pytest.approx(1.0)
    assert found["median"]["mae"] == pytest.approx(2.0)
