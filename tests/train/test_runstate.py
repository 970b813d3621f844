import errno
import json
import math
import os
import resource
import shutil

import pytest
import torch
from faults import ERRORS, FREEING, Child, failing, killing, points, watched

from mgt_fast.checkpoint import CheckpointError
from mgt_fast.config import MGTConfig
from mgt_fast.model import MGT
from mgt_fast.train.runstate import (
    LATEST,
    STATE,
    TENSORS,
    StateStore,
    pack_optimizer,
    step_of,
    unpack_optimizer,
)


def state_of(step):
    """Some tensors and a record that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    tensors = {"weight": torch.randn(7, 3, generator=generator), "count": torch.tensor(step)}
    return tensors, {"epoch": step // 10, "sum": 0.1 * step, "best": math.inf}


def same(found, step):
    tensors, record = state_of(step)
    return (
        found[0].keys() == tensors.keys()
        and all(torch.equal(found[0][name], value) for name, value in tensors.items())
        and found[1] == record
    )


def listing(store):
    return sorted(path.name for path in store.folder.iterdir()) if store.folder.exists() else []


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Sync nothing: what these tests kill are processes, not the machine; `watched` counts the calls."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def store(tmp_path):
    return StateStore(tmp_path / "run")


def saved(store, *steps):
    for step in steps:
        store.save(step, *state_of(step))
    return store


def test_everything_comes_back_bit_for_bit(store):
    odd = torch.tensor([0x7FC00001, -0x3FFFFF, 1, -(2**31)], dtype=torch.int32).view(torch.float32)
    tensors = {
        "odd": odd,  # NaNs with a payload, the least number, minus zero
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "generator": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
        "transposed": torch.arange(6).view(2, 3).T,
        "none": torch.empty(0, 3),
    }
    record = {
        "loss": 0.1 + 0.2,
        "best": math.inf,
        "log": {"steps.jsonl": 2**40},
        "name": "Å",
        "list": [1, None],
    }
    folder = store.save(12, tensors, record)
    assert folder == store.folder / "step-000000012"
    found, found_record = store.load()
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], value)]
        assert torch.equal(*bits), name
    assert found_record == record


def test_the_newest_states_stay_and_any_can_be_chosen(store):
    assert not store.exists()
    assert store.steps() == []
    with pytest.raises(CheckpointError, match="checkpoints holds no state to continue from"):
        store.load()
    saved(store, 1, 2, 3)
    assert store.exists()
    assert store.steps() == [2, 3]
    assert same(store.load(), 3)
    assert same(store.load(2), 2)
    assert listing(store) == ["latest", "step-000000002", "step-000000003"]
    with pytest.raises(
        CheckpointError, match=r"step-000000001 is missing; whole: step-000000003, step-000000002"
    ):
        store.load(1)
    with pytest.raises(ValueError, match="keep = 0"):
        StateStore(store.folder.parent, keep=0)


def test_going_on_from_an_earlier_state_leaves_the_later_ones(store):
    store.keep = 3
    saved(store, 10, 20, 30)
    saved(store, 15)
    assert store.steps() == [10, 15]
    assert same(store.load(), 15)


def test_a_state_may_be_saved_again(store):
    saved(store, 10, 20)
    for _ in range(3):
        saved(store, 20)
        assert store.steps() == [10, 20]
        assert same(store.load(), 20)
        assert same(store.load(20), 20)


def test_names_of_states():
    assert step_of("step-000001200") == step_of("step-000001200.1") == 1200
    assert step_of("step-1234567890") == 1234567890
    for name in ("latest", "step-12", "step-000001200/..", ".step-000001200.tmp"):
        with pytest.raises(ValueError, match="no name of a run state"):
            step_of(name)


def test_clearing_spares_what_is_not_ours(store):
    saved(store, 1, 2)
    (store.folder / "notes.txt").write_text("precious")
    (store.folder / ".step-000000009.tmp").mkdir()
    store.clear()
    assert listing(store) == ["notes.txt"]
    (store.folder / "notes.txt").unlink()
    saved(store, 1).clear()
    store.clear()
    assert not store.folder.exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def swap(path):
    shutil.copyfile(path.parents[1] / "step-000000001" / path.name, path)


@pytest.mark.parametrize(
    ("name", "damage", "difference"),
    [
        (TENSORS, cut, r"it has \d+ bytes, \d+ were recorded"),
        (TENSORS, flip, r"its SHA-256 is [0-9a-f]{64}, [0-9a-f]{64} was recorded"),
        (TENSORS, swap, r"its SHA-256 is [0-9a-f]{64}, [0-9a-f]{64} was recorded"),
        (TENSORS, os.unlink, "it is missing"),
        (STATE, cut, r"it cannot be read \(JSONDecodeError.*\)"),
        (STATE, swap, "it is the state of step 1"),
        (STATE, os.unlink, "it is missing"),
    ],
)
def test_a_damaged_state_is_named_and_no_other_is_taken(name, damage, difference, store):
    saved(store, 1, 2)
    file = store.folder / "step-000000002" / name
    damage(file)
    match = (
        rf"step-000000002/{name} is damaged: {difference}; whole: step-000000001; "
        "continue from there with --resume-from step-000000001"
    )
    with pytest.raises(CheckpointError, match=match):
        store.load()
    assert same(store.load(1), 1)
    damage_again = store.folder / "step-000000001" / TENSORS
    damage_again.unlink()
    with pytest.raises(CheckpointError, match=r"no other state is whole; start the run anew \(--overwrite\)"):
        store.load()


def test_every_flipped_bit_is_noticed(store):
    saved(store, 1)
    folder = store.folder / "step-000000001"
    for name in (TENSORS, STATE):
        whole = (folder / name).read_bytes()
        for position in points(8 * len(whole)):
            data = bytearray(whole)
            data[position // 8] ^= 1 << position % 8
            (folder / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=f"{name} is damaged"):
                store.load()
        (folder / name).write_bytes(whole)
    assert same(store.load(), 1)


@pytest.mark.parametrize("text", ["", "step-12\n", "../step-000000001\n", "step-000000001\nstep-000000002\n"])
def test_a_damaged_pointer_is_named(text, store):
    saved(store, 1, 2)
    (store.folder / LATEST).write_text(text)
    match = "latest is damaged: it holds .*; whole: step-000000002, step-000000001; .*-from step-000000002"
    with pytest.raises(CheckpointError, match=match):
        store.load()
    assert same(store.load(1), 1)
    saved(store, 3)
    assert same(store.load(), 3)


def test_a_pointer_to_a_missing_state_is_named(store):
    saved(store, 1, 2)
    shutil.rmtree(store.folder / "step-000000002")
    with pytest.raises(CheckpointError, match="step-000000002 is missing; whole: step-000000001"):
        store.load()


def test_a_state_of_another_format_is_refused(store):
    from mgt_fast.train.runstate import _digest

    saved(store, 1)
    file = store.folder / "step-000000001" / STATE
    state = json.loads(file.read_text())
    del state["sha256"]
    state["version"] = 99
    file.write_text(json.dumps({**state, "sha256": _digest(state)}))
    with pytest.raises(CheckpointError, match=r"state\.json is no mgt-fast run state of version 1"):
        store.load()


# What a save does depends on what is there: nothing, one state, a state that is too many, a course that the
# run left, the state of the same step.
SITUATIONS = {
    "first": ((), 5),
    "second": ((5,), 6),
    "third": ((4, 5), 6),
    "back": ((4, 9), 6),
    "again": ((4, 6), 6),
}
situations = pytest.mark.parametrize(("before", "step"), SITUATIONS.values(), ids=SITUATIONS)


def kept(before, step):
    """The states that stay after another was saved."""
    return [*(earlier for earlier in before if earlier < step), step][-2:]


def record_operations(store, before, step):
    saved(store, *before)
    with watched() as done:
        saved(store, step)
    shutil.rmtree(store.folder.parent)
    return done


def test_everything_is_synced_before_it_is_named(store):
    store.folder.parent.mkdir()
    with watched() as operations:
        saved(store, 1)
    write = ["open", "write", "fsync"]
    assert operations == [
        *["mkdir", "fsync"],  # checkpoints/
        *["mkdir", *write, *write, "fsync", "rename", "fsync"],  # the state, moved to its name
        *[*write, "replace", "fsync", "unlink"],  # the pointer
    ]


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@situations
def test_a_full_or_failing_disk_leaves_the_earlier_state(before, step, code, stays, store):
    operations = record_operations(store, before, step)
    for at in points(len(operations)):
        saved(store, *before)
        names = listing(store)
        latest = before[-1] if before else None
        with pytest.raises(OSError, match="run state") as failure, watched(failing(at, code, stays)):
            store.save(step, *state_of(step))
        message = str(failure.value)
        assert failure.value.errno == code
        assert os.strerror(code) in message
        assert str(store.folder) in message
        assert "bytes, and " in message
        assert "are free in" in message
        if operations[at] not in FREEING and listing(store) == names:
            if latest is None:
                assert "there was no earlier state" in message
                assert not store.exists()
            else:
                assert f"step-{latest:09d} is whole: make room" in message
                assert same(store.load(), latest)
        else:  # the new state was complete; what failed was to sync that, or to remove old ones
            assert f"step-{step:09d}" in message.partition("free in")[2]
            assert same(store.load(), step)
            assert set(listing(store)) - {LATEST} <= {
                *names,
                f"step-{step:09d}",
                f"step-{step:09d}.1",
                *(f".{name}.tmp" for name in names if operations[at] in FREEING),
            }
        saved(store, step)
        assert same(store.load(), step)
        assert store.steps() == kept(before, step)
        assert len(listing(store)) == len(store.steps()) + 1
        shutil.rmtree(store.folder.parent)


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within writes"])
@situations
def test_a_killed_process_leaves_the_earlier_or_the_new_state(before, step, torn, store):
    operations = record_operations(store, before, step)
    for at in points(len(operations) + 1):

        def die(at=at):
            with watched(killing(at, torn)):
                saved(store, step)

        saved(store, *before)
        assert Child(die).result() is None
        if store.exists():
            assert same(store.load(), step) or (before and same(store.load(), before[-1]))
        else:
            assert not before
        saved(store, step)
        assert same(store.load(), step)
        assert store.steps() == kept(before, step)
        assert len(listing(store)) == len(store.steps()) + 1
        shutil.rmtree(store.folder.parent)


def test_a_disk_that_takes_part_of_a_file(store):
    saved(store, 1)
    names, large = listing(store), {"weight": torch.zeros(2**16)}

    def save_within_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        with pytest.raises(
            OSError, match=r"File too large.*needs 26\d,\d{3} bytes.*step-000000001 is whole"
        ) as failure:
            store.save(2, large, {})
        return failure.value.errno

    assert Child(save_within_limit).result() == errno.EFBIG
    assert listing(store) == names
    assert same(store.load(), 1)


def small_model(seed):
    torch.manual_seed(seed)
    return MGT(MGTConfig(channels=2, num_scalars=2, num_vectors=1, num_blocks=1, expert_hidden=2))


def optimizers():
    """Networks that took two steps with an optimiser each: fused, looping, and one with two groups."""
    for options in ({"fused": True}, {"foreach": False}, {"amsgrad": True}):
        model = small_model(3)
        first, *others = model.parameters()
        groups = (
            [{"params": [first], "lr": 0.3}, {"params": others}]
            if "amsgrad" in options
            else model.parameters()
        )
        optimizer = torch.optim.AdamW(groups, lr=0.1, **options)
        yield model, optimizer
        for step in range(2):
            take_step(model, optimizer, step)


def take_step(model, optimizer, step):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(step)
    for parameter in list(model.parameters())[: -1 if step else None]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def identical(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == value.dtype and torch.equal(first[name], value) for name, value in second.items()
    )


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_an_optimiser_goes_on_bit_for_bit(used, store):
    for model, optimizer in list(optimizers()):
        assert len(pack_optimizer(optimizer)) > len(list(model.parameters()))
        store.save(2, {**model.state_dict(), **pack_optimizer(optimizer)}, {})
        tensors, _ = store.load()
        other = small_model(4)
        first, *others = other.parameters()
        groups = (
            [{"params": [first]}, {"params": others}]
            if len(optimizer.param_groups) > 1
            else other.parameters()
        )
        options = {name: optimizer.defaults[name] for name in ("fused", "foreach", "amsgrad")}
        resumed = torch.optim.AdamW(groups, lr=1.0, **options)
        if used:
            take_step(other, resumed, 0)
        held = {id(value) for state in resumed.state.values() for value in state.values()}
        other.load_state_dict({name: tensors[name] for name in other.state_dict()})
        unpack_optimizer(resumed, tensors)
        assert identical(pack_optimizer(resumed), pack_optimizer(optimizer))
        assert held <= {id(value) for state in resumed.state.values() for value in state.values()}
        for step in (2, 3):
            take_step(model, optimizer, step)
            take_step(other, resumed, step)
        assert identical(other.state_dict(), model.state_dict())
        assert identical(pack_optimizer(resumed), pack_optimizer(optimizer))


def test_an_optimiser_that_took_no_step():
    model = small_model(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), capturable=True)
    packed = pack_optimizer(optimizer)
    assert packed == {"optimizer.lr.0": torch.tensor(0.25, dtype=torch.float64)}
    other = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.0), capturable=True)
    rate = other.param_groups[0]["lr"]
    unpack_optimizer(other, packed)
    assert rate == 0.25
    assert other.param_groups[0]["lr"] is rate
    assert pack_optimizer(other) == packed


def test_a_state_of_another_network_does_not_reach_the_optimiser():
    (_, optimizer), *_ = optimizers()
    before = pack_optimizer(optimizer)
    first = next(name for name, value in before.items() if value.dim() == 2)
    for change, message in [
        (
            {"optimizer.999.exp_avg": torch.zeros(1)},
            r"optimizer\.999\.exp_avg is none of its \d+ parameters'",
        ),
        ({"optimizer.x": torch.zeros(1)}, r"optimizer\.x is none of its"),
        ({first: torch.zeros(5)}, r"exp_avg has shape \(5,\), its parameter \("),
    ]:
        with pytest.raises(CheckpointError, match=message):
            unpack_optimizer(optimizer, {**before, **change})
    with pytest.raises(CheckpointError, match=r"optimizer\.lr\.0 is missing"):
        unpack_optimizer(optimizer, {name: value for name, value in before.items() if "lr" not in name})
    assert identical(pack_optimizer(optimizer), before)
