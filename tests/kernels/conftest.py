import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory():
    """Fill what `torch.empty` returns with NaN, so that a forgotten element shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
