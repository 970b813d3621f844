import errno
import io
import json
import math
import os
import random
import shutil

import pytest
from faults import ERRORS, Child, failing, killing, points, watched
from rich.console import Console

from mgt_fast.checkpoint import CheckpointError
from mgt_fast.train.config import ConfigError, FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.lock import LOCK, FolderLockedError
from mgt_fast.train.runlog import CONFIG, METRICS, RESULTS, STEPS, NullLog, RunLog, read_metrics, read_steps
from mgt_fast.train.runstate import StateStore


@pytest.fixture
def console():
    return Console(file=io.StringIO())


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def take_steps(log, steps, losses=math.sqrt):
    for step in steps:
        log.record_step(step, (step + 2) // 3, {"loss": losses(step), "norm": 1 / step})
        if step % 3 == 0:
            log.record(step // 3, {"val_mae": 1 / step})


def test_every_number_comes_back_exactly(folder, console):
    generator = random.Random(0)
    numbers = [generator.random() * 10.0 ** generator.randint(-300, 300) for _ in range(1000)]
    with RunLog(folder, FinetuneConfig(), console) as log:
        for step, number in enumerate(numbers, 1):
            log.record_step(step, 1, {"loss": number, "lr": 5e-324})
    records = read_steps(folder)
    assert [record["loss"] for record in records] == numbers
    assert records[6] == {"step": 7, "epoch": 1, "loss": numbers[6], "lr": 5e-324}


def test_lines_of_steps_reach_the_disk_with_the_state(folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 6))
        assert read_metrics(folder) == [{"epoch": 1, "val_mae": 1 / 3}]
        assert read_steps(folder) == []
        position = log.position()
        assert position == {name: (folder / name).stat().st_size for name in (METRICS, STEPS)}
        assert len(read_steps(folder)) == 5
        assert json.loads(json.dumps(position)) == position
        log.record_step(6, 2, {"text": "x" * 2**17})  # more than is held back
        assert len(read_steps(folder)) == 6


@pytest.mark.parametrize("saved_after", [0, 1, 4, 6])
def test_a_resumed_run_has_every_line_once(saved_after, folder, console):
    """The process dies after step 7, once with a torn line, and goes on from an earlier step."""
    uninterrupted = folder.with_name("uninterrupted")
    with RunLog(uninterrupted, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 10))

    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, saved_after + 1))
        position = log.position()
        take_steps(log, range(saved_after + 1, 8), losses=lambda step: -1.0)
    for name in (METRICS, STEPS):
        with (folder / name).open("ab") as file:
            file.write(b'{"epoch": 3, "va')
    assert len(read_steps(folder)) == 7
    with RunLog(folder, FinetuneConfig(), console, resume=True) as log:
        log.rewind(position)
        take_steps(log, range(saved_after + 1, 10))
    assert contents(folder) == contents(uninterrupted)


def test_a_run_without_a_state_begins_anew(folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 4))
    with RunLog(folder, FinetuneConfig(), console, resume=True) as log:
        log.rewind(None)
        take_steps(log, range(1, 3))
    assert len(read_steps(folder)) == 2
    assert read_metrics(folder) == []


def test_lines_that_the_state_saw_and_the_disk_has_not(folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 4))
        position = log.position()
    (folder / STEPS).write_bytes((folder / STEPS).read_bytes()[:-3])
    before = contents(folder)
    with (
        RunLog(folder, FinetuneConfig(), console, resume=True) as log,
        pytest.raises(
            CheckpointError, match=rf"steps\.jsonl is damaged: it has \d+ bytes, {position[STEPS]} were"
        ),
    ):
        log.rewind(position)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "optim.epochs=501",
            r"optim\.epochs = 501, the run has 500 \(the learning rate's schedule spans all epochs\)",
        ),
        ("seed=5", r"seed = 5, the run has 123 \(the order of the crystals"),
        ("precision=bf16", "precision = 'bf16', the run has 'float32'"),
        ("optim.lr=0.1", r"optim\.lr = 0\.1, the run has 0\.0005"),
        ("model.channels=64", r"model\.channels = 64, the run has 256"),
        ("data.target=band_gap", r"data\.target = 'band_gap', the run has 'formation_energy_per_atom'"),
        ("data.fractions=[0.5, 0.25, 0.25]", r"data\.fractions = \[0\.5, 0\.25, 0\.25\], the run has None"),
    ],
)
def test_a_run_is_not_resumed_with_settings_that_change_it(change, message, folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 4))
    before = contents(folder)
    config = load_config(FinetuneConfig, overrides=[change])
    with pytest.raises(
        ConfigError, match=f"run cannot be resumed with other settings: {message}.*--config .*yaml"
    ):
        RunLog(folder, config, console, resume=True)
    assert contents(folder) == before


def test_every_setting_at_fault_is_named(folder, console):
    with RunLog(folder, FinetuneConfig(), console):
        pass
    config = load_config(FinetuneConfig, overrides=["seed=1", "optim.grad_clip=1", "threads=1"])
    with pytest.raises(
        ConfigError, match=r"settings: optim\.grad_clip = 1\.0, the run has None; seed = 1"
    ) as error:
        RunLog(folder, config, console, resume=True)
    assert "threads" not in str(error.value)


def test_settings_that_change_nothing_may_differ(folder, console):
    with RunLog(folder, FinetuneConfig(), console):
        pass
    config = load_config(FinetuneConfig, overrides=["threads=1", "tensorboard=true"])
    with RunLog(folder, config, console, resume=True) as log:
        log.rewind(None)
    assert load_config(FinetuneConfig, folder / CONFIG) == config


def test_free_settings_exist():
    from mgt_fast.train.config import _known_keys
    from mgt_fast.train.runlog import _REASONS, FREE_KEYS

    known = {*_known_keys(PretrainConfig), *_known_keys(FinetuneConfig), "checkpoint"}
    assert {*FREE_KEYS, *_REASONS} <= known
    assert not set(FREE_KEYS) & _REASONS.keys()


@pytest.mark.parametrize("kind", [PretrainConfig, None])
def test_what_holds_no_such_run_is_not_resumed(kind, folder, console):
    if kind is not None:
        with RunLog(folder, kind(), console):
            pass
    before = contents(folder) if kind else None
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        RunLog(folder, FinetuneConfig(), console, resume=True)
    assert contents(folder) == (before or {})


def test_resuming_and_overwriting_exclude_each_other(folder, console):
    with pytest.raises(ValueError, match="either resumed or overwritten"):
        RunLog(folder, FinetuneConfig(), console, overwrite=True, resume=True)
    assert not folder.exists()


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_in_use_is_not_touched(options, folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        take_steps(log, range(1, 4))
        log.position()
        before = contents(folder)
        with pytest.raises(FolderLockedError, match=f"process {os.getpid()} on"):
            RunLog(folder, FinetuneConfig(seed=7), console, **options)
        assert contents(folder) == before
    assert not (folder / LOCK).exists()


def test_overwriting_removes_the_run_and_nothing_else(folder, console):
    with RunLog(folder, FinetuneConfig(tensorboard=True), console) as log:
        take_steps(log, range(1, 4))
        log.write_results({"a": 1})
        StateStore(folder).save(3, {}, {})
    (folder / "notes.txt").write_text("precious")
    (folder / ".results.json.99999.tmp").write_text("left by a killed process")
    with pytest.raises(
        FileExistsError,
        match=r"config\.yaml, metrics\.jsonl, steps\.jsonl, results\.json, checkpoints, tensorboard; choose",
    ):
        RunLog(folder, FinetuneConfig(), console)
    with RunLog(folder, FinetuneConfig(), console, overwrite=True):
        pass
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, METRICS, "notes.txt", STEPS]
    assert read_metrics(folder) == read_steps(folder) == []


def test_tensorboard_forgets_what_is_done_again(folder, console):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = FinetuneConfig(tensorboard=True)
    with RunLog(folder, config, console) as log:
        log.record(1, {"val_mae": 3.0})
        position = log.position()
        log.record(2, {"val_mae": 2.5})
        log.record(3, {"val_mae": 2.0})
    with RunLog(folder, config, console, resume=True) as log:
        log.rewind(position)
        log.record(2, {"val_mae": 2.25})
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("val_mae")] == [(1, 3.0), (2, 2.25)]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_a_full_disk_gives_a_clear_error_and_later_all_lines(code, folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        for at, name in enumerate((METRICS, STEPS, STEPS)):  # of the first there is nothing but to sync it
            take_steps(log, [2 * at + 1, 2 * at + 2])
            with (
                watched(failing(at, code)),
                pytest.raises(OSError, match=f"{name} could not be written") as failure,
            ):
                log.position()
            assert failure.value.errno == code
            for text in (os.strerror(code), str(folder), "bytes, and ", "are free in", "its first"):
                assert text in str(failure.value)
    assert [record["step"] for record in read_steps(folder)] == [1, 2, 3, 4, 5, 6]


def test_the_lock_ends_where_the_disk_stays_full(folder, console):
    log = RunLog(folder, FinetuneConfig(), console)
    log.record_step(1, 1, {"loss": 1.0})
    with watched(failing(0, errno.ENOSPC, stays=True)):
        with pytest.raises(OSError, match=r"metrics\.jsonl could not be written"):
            log.record(1, {"val_mae": 1.0})
        with pytest.raises(OSError, match=r"jsonl could not be written"):
            log.__exit__()
    assert not (folder / LOCK).exists()
    assert read_steps(folder) == read_metrics(folder) == []


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within writes"])
def test_a_killed_run_is_resumed_without_a_gap(torn, folder, console):
    """Log and states together: killed anywhere and resumed, a run leaves the files of one that was not."""

    def run(resume):
        store, done = StateStore(folder), 0
        with RunLog(folder, FinetuneConfig(), console, resume=resume) as log:
            if store.exists():
                _, record = store.load()
                done = record["step"]
                log.rewind(record["log"])
            elif resume:
                log.rewind(None)
            for step in range(done + 1, 10):
                take_steps(log, [step])
                if step % 4 == 0:
                    store.save(step, {}, {"step": step, "log": log.position()})
            log.write_results({"steps": 9})

    with watched() as operations:
        run(resume=False)
    expected = contents(folder)
    states = [(path.name, path.read_bytes()) for path in sorted(folder.glob("checkpoints/*/*"))]
    started = operations.index("replace") + 1  # there is a configuration now, so that it can be resumed
    for at in points(len(operations) - started):
        shutil.rmtree(folder)

        def die(at=at + started):
            with watched(killing(at, torn)):
                run(resume=False)

        assert Child(die).result() is None
        run(resume=True)
        assert contents(folder) == expected
        assert [(path.name, path.read_bytes()) for path in sorted(folder.glob("checkpoints/*/*"))] == states


def test_the_other_ranks_keep_nothing(folder, console):
    with NullLog(folder, console) as log:
        log.record(1, {"a": 1.0})
        log.record_step(1, 1, {"a": 1.0})
        log.rewind({METRICS: 5})
        log.write_results({"a": 1})
        log.say("nothing")
        with log.progress() as progress:
            progress.update(progress.add_task("training", total=1), advance=1)
        assert log.position() == {}
        assert (log.folder, log.console) == (folder, console)
    assert not folder.exists()
    assert console.file.getvalue() == ""
    methods = {name for name in vars(RunLog) if not name.startswith("_")}
    assert methods <= {name for name in vars(NullLog) if not name.startswith("_")}


def test_results_are_replaced_in_one_step(folder, console):
    with RunLog(folder, FinetuneConfig(), console) as log:
        log.write_results({"mae": 0.1})
        with (
            watched(failing(2, errno.ENOSPC)),
            pytest.raises(OSError, match=r"earlier results\.json is whole"),
        ):
            log.write_results({"mae": 0.2})
        assert json.loads((folder / RESULTS).read_text()) == {"mae": 0.1}
