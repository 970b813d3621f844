from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import GOLDEN, TASKS
from safetensors.torch import load_file

from mgt_fast.config import MGTConfig
from mgt_fast.importer import (
    config_from_state_dict,
    load_published_checkpoint,
    published_shapes,
    published_state_dict,
)
from mgt_fast.reference import ReferenceMGT


def golden_state(task="finetune"):
    prefix = f"{task}.state_dict."
    return {k.removeprefix(prefix): v for k, v in load_file(GOLDEN).items() if k.startswith(prefix)}


@pytest.mark.parametrize("task", TASKS)
def test_only_the_unused_parameters_are_dropped(task):
    golden = golden_state(task)
    state, ignored = published_state_dict(golden)
    assert sorted(ignored) == sorted(
        f"se3_graph_encoder.edges_layer.{i}.{name}"
        for i in range(2)
        for name in ("lemb.weight", "lin_edge_len.weight", "lin_edge_len.bias")
    )
    assert state.keys() == golden.keys() - set(ignored)
    assert published_state_dict(state) == (state, [])


@pytest.mark.parametrize("task", TASKS)
def test_sizes_are_read_from_the_shapes(task):
    config = config_from_state_dict(golden_state(task))
    expected = MGTConfig(task=TASKS[task], channels=32, num_scalars=16, num_vectors=4)
    assert config == (replace(expected, expert_hidden=16) if task == "finetune" else expected)


@pytest.mark.parametrize(
    "config",
    [
        MGTConfig(task="pretrain", channels=12, num_scalars=6, num_vectors=2, num_blocks=3),
        MGTConfig(channels=10, num_scalars=4, num_vectors=3, num_blocks=1, expert_hidden=7, output_dim=4),
    ],
)
def test_the_layout_is_the_reference_models(config):
    state = ReferenceMGT(config).state_dict()
    assert published_shapes(config) == {name: tuple(value.shape) for name, value in state.items()}
    assert config_from_state_dict(state) == config


def test_every_missing_unexpected_and_misshapen_name_is_listed():
    state = golden_state()
    del state["se3_graph_encoder.atoms_layer.1.bn.bias"]
    del state["so3_projection_encoder.fc.bias"]
    state["lin_new.weight"] = torch.zeros(1)
    state["so3_graph_encoder.transconv.0.lin_query.bias"] = torch.zeros(31)
    with pytest.raises(ValueError, match="does not fit") as error:
        config_from_state_dict(state)
    assert (
        "2 missing: se3_graph_encoder.atoms_layer.1.bn.bias, so3_projection_encoder.fc.bias; "
        "1 unexpected: lin_new.weight; "
        "1 of another shape: so3_graph_encoder.transconv.0.lin_query.bias (31,), expected (32,)"
    ) in str(error.value)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda name: not name.startswith("mixture_of_experts."), "holds neither"),
        (lambda name: "output_mask" not in name, "lacks.*nlayer_1.tp.output_mask"),
        (lambda name: ".atoms_layer." not in name, "num_blocks = 0"),
        (lambda name: False, "its 0 names begin with: -"),
    ],
)
def test_what_is_no_mgt_is_refused(keep, message):
    with pytest.raises(ValueError, match=message):
        config_from_state_dict({name: value for name, value in golden_state().items() if keep(name)})


def test_both_kinds_of_head_at_once_are_refused():
    with pytest.raises(ValueError, match="holds both"):
        config_from_state_dict(golden_state("pretraining") | golden_state("finetune"))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoints_load_however_they_were_wrapped(wrapper, prefix, tmp_path):
    golden = golden_state()
    content = {prefix + name: value for name, value in golden.items()}
    torch.save({wrapper: content, "epoch": 3} if wrapper else content, tmp_path / "published.pt")
    state = load_published_checkpoint(tmp_path / "published.pt")
    assert state.keys() == golden.keys()
    assert all(torch.equal(state[name], value) for name, value in golden.items())


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    victim = tmp_path / "written"
    torch.save({"state_dict": golden_state(), "hook": Payload(str(victim))}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt is damaged, or no file of plain tensors"):
        load_published_checkpoint(tmp_path / "evil.pt")
    assert not victim.exists()


def damaged(path):
    torch.save(golden_state(), path)
    whole = path.read_bytes()
    return {"empty": b"", "junk": b"junk\n" * 20, "text": b"no checkpoint", "cut": whole[: len(whole) // 2]}


@pytest.mark.parametrize("kind", ["empty", "junk", "text", "cut"])
def test_a_damaged_file_is_refused(kind, tmp_path):
    path = tmp_path / "published.pt"
    path.write_bytes(damaged(path)[kind])
    with pytest.raises(ValueError, match=r"published\.pt is damaged, or no file of plain tensors"):
        load_published_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({"epoch": 3, "weights": {}}, r"beside tensors it has: epoch \(int\), weights \(dict\)"),
        ({}, "nothing at all"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(content, message, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        load_published_checkpoint(tmp_path / "other.pt")
