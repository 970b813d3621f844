"""`mgt-fast profile` on a GPU: its time is shared out, and operations have the kernels they started."""

import pytest
import torch

pytest.importorskip("pydantic")

from mgt_fast.train.config import PretrainConfig, load_config
from mgt_fast.train.profile import profile_steps, run_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS = ["model.channels=64", "data.limit=200", "optim.batch_size=32", "device=cuda"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    return profile_steps(load_config(PretrainConfig, None, SETTINGS), tmp_path_factory.mktemp("p"), 4, 3)


def test_shares_of_the_gpus_time(profiled):
    assert profiled.clock == "gpu"
    for table in (profiled.ranges, profiled.host_ranges):
        assert sum(one.share for one in table) == pytest.approx(1)
    ranges = {one.range: one for one in profiled.ranges}
    assert profiled.ranges[-1].range == "idle"
    for name in ("se3.edges_layer.0", "se3.atoms_layer.1", "so3.equi_update.0", "so3.transconv.1"):
        assert ranges[name].forward_s > 0
        assert ranges[name].backward_s > 0
    assert ranges["neighbours"].forward_s > 0
    assert ranges["optimiser"].forward_s > 0


def test_kernels_of_operations(profiled):
    operations = {one.operation: one for one in profiled.operations}
    keys = operations["mgt_fast::gated_attention_keys"]
    assert "keys_kernel" in {one.kernel for one in keys.kernels}
    assert keys.calls == 6  # layers: two edge-wise, four node-wise
    assert keys.roof_share > 0
    assert keys.seconds == pytest.approx(sum(one.seconds for one in keys.kernels))


def test_steps_under_nvidias_tools():
    pytest.importorskip("nvtx")
    run_steps(load_config(PretrainConfig, None, SETTINGS), steps=1, warmup=1)
