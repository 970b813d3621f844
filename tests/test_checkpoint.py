import errno
import json
import os
from dataclasses import asdict

import pytest
import torch
from faults import ERRORS, Child, failing, killing, watched
from safetensors.torch import load_file, save_file

from mgt_fast.checkpoint import (
    BEST,
    CheckpointError,
    CheckpointMeta,
    load_checkpoint,
    load_model,
    save_checkpoint,
    transfer_weights,
)
from mgt_fast.config import MGTConfig
from mgt_fast.model import MGT

SIZES = {"channels": 8, "num_scalars": 4, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 4}


def network(seed=0, **settings):
    torch.manual_seed(seed)
    return MGT(MGTConfig(**SIZES, **settings))


@pytest.fixture
def saved(tmp_path):
    model = network()
    meta = CheckpointMeta(
        model=model.config,
        max_neighbors=12,
        compat="comformer",
        target="band_gap",
        unit="eV",
        target_mean=1.25,
        target_std=0.1,
        dataset="abc",
        fractions=(0.8, 0.1, 0.1),
        seed=5,
        epoch=3,
        metrics={"val_mae": 0.1234567890123},
    )
    path = tmp_path / BEST
    save_checkpoint(path, model, meta)
    return path, model, meta


def test_round_trip(saved):
    path, model, meta = saved
    state, found = load_checkpoint(path)
    assert found == meta
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value), name


def test_metadata_of_older_checkpoints_are_completed(saved):
    meta = saved[2]
    older = asdict(meta)
    del older["shell_tolerance"]
    assert CheckpointMeta.from_dict(older) == meta


def test_load_model_takes_a_run_folder_and_is_in_eval_mode(saved):
    path, model, meta = saved
    loaded = load_model(path.parent)
    assert loaded.meta == meta
    assert loaded.config == model.config
    assert not loaded.training
    assert MGT.load(path).meta == meta


def test_any_reader_opens_it_and_nothing_is_left_behind(saved):
    path, model, _ = saved
    assert load_file(path).keys() == model.state_dict().keys()
    assert [file.name for file in path.parent.iterdir()] == [BEST]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_full_or_failing_disk_leaves_the_earlier_checkpoint(code, tmp_path):
    path, models = tmp_path / BEST, [network(seed) for seed in (1, 2)]
    old, new = (CheckpointMeta(model=model.config, epoch=epoch) for epoch, model in enumerate(models))
    with watched() as operations:
        save_checkpoint(path, models[0], old)
    assert operations == ["open", "write", "fsync", "replace", "fsync", "unlink"]
    for at, operation in enumerate(operations):
        save_checkpoint(path, models[0], old)
        with (
            pytest.raises(OSError, match=r"best\.safetensors could not be written") as failure,
            watched(failing(at, code)),
        ):
            save_checkpoint(path, models[1], new)
        assert failure.value.errno == code
        for text in (
            os.strerror(code),
            str(tmp_path),
            "bytes, and ",
            "are free in",
            "the earlier best.safetensors is whole",
        ):
            assert text in str(failure.value)
        if operation != "unlink":
            assert os.listdir(tmp_path) == [BEST]
        assert load_checkpoint(path)[1] == (new if at > operations.index("replace") else old)


def test_a_killed_process_leaves_the_earlier_or_the_new_checkpoint(tmp_path):
    path, models = tmp_path / BEST, [network(seed) for seed in (1, 2)]
    old, new = (CheckpointMeta(model=model.config, epoch=epoch) for epoch, model in enumerate(models))
    found = []
    for at, torn in [*((at, False) for at in range(6)), (1, True)]:

        def die(at=at, torn=torn):
            with watched(killing(at, torn)):
                save_checkpoint(path, models[1], new)

        save_checkpoint(path, models[0], old)
        assert Child(die).result() is None
        found.append(load_checkpoint(path)[1].epoch)
    assert found == [0, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize("where", [0.3, 0.9])
def test_a_flipped_bit_in_the_weights_is_noticed(saved, where):
    path, _, _ = saved
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(where * (len(data) - header))] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: its contents have SHA-256 .* was recorded"):
        load_checkpoint(path)


def test_a_changed_scaling_is_noticed(saved):
    path, _, _ = saved
    data = path.read_bytes()
    assert data.count(b"1.25") == 1
    path.write_bytes(data.replace(b"1.25", b"1.35"))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)


def test_a_truncated_file(saved):
    path, _, _ = saved
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        load_checkpoint(path)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nothing\.safetensors"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no best\.safetensors"):
        load_checkpoint(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "published.pt")
    with pytest.raises(CheckpointError, match="mgt-fast import-checkpoint"):
        load_checkpoint(tmp_path / "published.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of mgt-fast"):
        load_checkpoint(tmp_path / "other.safetensors")
    metadata = {"mgt_fast": json.dumps({"meta": {"model": {"chanels": 3}}, "sha256": ""})}
    save_file({"a": torch.zeros(1)}, tmp_path / "newer.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"cannot be read by this version .*chanels"):
        load_checkpoint(tmp_path / "newer.safetensors")


def test_weights_of_another_network(tmp_path):
    save_checkpoint(tmp_path / BEST, network(), CheckpointMeta(model=MGTConfig(**SIZES | {"channels": 16})))
    with pytest.raises(CheckpointError, match="do not fit each other"):
        load_model(tmp_path)


@pytest.mark.parametrize("denoising", ["crystal", "edge"])
def test_pretrained_weights_move_over_and_heads_are_named(denoising):
    pretrained, model = network(1, task="pretrain", denoising=denoising), network(2)
    heads = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("mixture")}
    fresh, unused = transfer_weights(model, pretrained.state_dict())
    assert fresh == ["mixture_of_experts"]
    assert unused == ["se3_angle_layer", "so3_edge_layer"]
    own = model.state_dict()
    for name, value in pretrained.state_dict().items():
        if name.partition(".")[0] not in unused:
            assert torch.equal(own.pop(name), value), name
    assert own.keys() == heads.keys()
    assert all(torch.equal(own[name], heads[name]) for name in heads)


def test_a_fine_tuned_network_moves_over_whole():
    model, other = network(1), network(2)
    assert transfer_weights(model, other.state_dict()) == ([], [])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def _drop(state):
    del state["se3_graph_encoder.atom_embedding.weight"]


def _add(state):
    state["so3_graph_encoder.extra"] = torch.zeros(1)


def _reshape(state):
    state["se3_projection_encoder.fc.bias"] = torch.zeros(3)


def _drop_encoder(state):
    for name in [name for name in state if name.startswith("so3_graph_encoder")]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"se3_graph_encoder\.atom_embedding\.weight is missing from the checkpoint"),
        (_add, r"so3_graph_encoder\.extra is not in the network"),
        (_reshape, r"se3_projection_encoder\.fc\.bias has shape \(3,\), \(8,\) in the network"),
        (_drop_encoder, r"the checkpoint lacks so3_graph_encoder"),
    ],
)
def test_missing_weights_never_pass(change, message):
    model = network(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = network(1, task="pretrain").state_dict()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        transfer_weights(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
