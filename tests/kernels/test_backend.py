import pytest
import torch

from mgt_fast import kernels
from mgt_fast.kernels import launch, resolve_backend


def test_auto_follows_the_device():
    assert resolve_backend("auto", "cpu") == resolve_backend("torch", "cpu") == "torch"
    assert resolve_backend("torch", "cuda") == "torch"
    assert resolve_backend("auto", torch.device("cuda", 1)) == "triton"


def test_nothing_falls_back(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="need a CUDA device and the data are on cpu"):
        resolve_backend("triton", "cpu")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"Triton is not installed: pip install 'mgt-fast\[cuda\]'"):
        resolve_backend("auto", "cuda")
    with pytest.raises(ValueError, match="backend = 'cuda'"):
        resolve_backend("cuda", "cuda")
