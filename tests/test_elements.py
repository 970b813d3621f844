import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from mgt_fast import elements
from mgt_fast.elements import cgcnn_features, has_features

GOLDEN = Path(__file__).parent / "golden"


def test_features_are_one_hot_codes_of_the_first_hundred_elements():
    features = cgcnn_features()
    assert features.shape == (119, 92)
    assert features.dtype == torch.float32
    assert not features[0].any()
    known = features[1:101]
    assert set(known.unique().tolist()) == {0.0, 1.0}
    assert known.sum(1).min() >= 6
    assert features[101:].isnan().all()
    assert has_features().nonzero()[0].tolist() == list(range(1, 101))


def test_features_are_those_of_the_golden_crystals():
    checked = 0
    for file in GOLDEN.glob("*.safetensors"):
        with safe_open(file, "pt") as fixture:
            if "input.atom_features" in fixture.keys():  # noqa: SIM118 (safe_open is no dict)
                numbers = fixture.get_tensor("input.numbers").long()
                assert torch.equal(
                    cgcnn_features()[numbers], fixture.get_tensor("input.atom_features").float()
                )
                checked += 1
    assert checked


def test_the_table_cannot_be_changed_by_a_caller():
    cgcnn_features()[1] = 7
    assert cgcnn_features()[1].max() == 1


def test_the_model_needs_no_data_path():
    script = "import sys, mgt_fast.model, mgt_fast.reference; print(*sys.modules, sep='\\n')"
    modules = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "mgt_fast.elements" in modules
    assert not [name for name in modules if name.startswith(("mgt_fast.data", "pyarrow"))]


def test_features_do_not_depend_on_the_default_device_at_first_use():
    elements._read_features.cache_clear()
    with torch.device("meta"):
        features = elements.cgcnn_features()
    assert features.device.type == "cpu"
    assert torch.equal(features[6], elements.cgcnn_features()[6])
