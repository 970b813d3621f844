"""Files made to harm, through every reader: no code runs, the error is clear, memory and time are bounded."""

import json
import os
import pickle
import re
import resource
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from faults import Child
from hostile import CANARY, CHECKPOINTS, CONFIGS, MANIFESTS, PICKLES
from typer.testing import CliRunner

from mgt_fast import MGT
from mgt_fast.checkpoint import load_checkpoint
from mgt_fast.cli import app
from mgt_fast.data import CrystalDataset, prepare
from mgt_fast.importer import config_from_state_dict, load_published_checkpoint
from mgt_fast.train import finetune, pretrain  # noqa: F401 (imported once, not by every child)
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config
from mgt_fast.train.runstate import LATEST, STATE, TENSORS, StateStore, _digest

MEMORY = 150 * 2**20  # bytes that refusing a file may take
SECONDS = 10  # on a busy machine; it takes a fraction of one
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "ctypes.dlopen")
TEXTS = ("elsewhere", "/dev/zero", "antigravity")  # what no file may make us open or import


def refusals(folder, *readers):
    """Run readers in a process of their own, where each must raise ValueError; return the messages."""

    def attempt():
        seen, messages = [], []

        def watch(event, arguments):
            if event in PROGRAMS or (
                event in ("open", "import") and any(t in str(arguments[0]) for t in TEXTS)
            ):
                seen.append(f"{event} {arguments}")

        os.chdir(folder)
        size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (size + 6 * 2**30,) * 2)  # for the machine's sake
        sys.addaudithook(watch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in readers:
            signal.alarm(SECONDS)
            try:
                read()
            except ValueError as error:
                messages.append(str(error))
        signal.alarm(0)
        return messages, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), seen

    messages, memory, seen = Child(attempt).result()
    assert seen == []
    assert not (folder / CANARY).exists()
    assert len(messages) == len(readers)
    assert memory < MEMORY
    assert max(map(len, messages)) < 2000
    return messages


def made(folder, name, content):
    content = content()
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def command(*arguments):
    """Run a command as a user would; the error that it reports becomes ValueError, a traceback does not."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    if not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") < 6  # YAML says where in lines of their own
    raise ValueError(result.stderr)


READERS = {
    "load_checkpoint": load_checkpoint,
    "MGT.load": MGT.load,
    "load_published_checkpoint": lambda path: config_from_state_dict(load_published_checkpoint(path)),
    "import-checkpoint": lambda path: command("import-checkpoint", path, "-o", "imported.safetensors"),
    "predict --model": lambda path: command("predict", path.parent, "--model", path, "-o", "table.csv"),
    "finetune --from": lambda path: command("finetune", "--from", path, "-o", "run"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, tmp_path):
    path = made(tmp_path, name, CHECKPOINTS[name])
    for message in refusals(tmp_path, *(partial(read, path) for read in READERS.values())):
        assert name in message


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, tmp_path):
    path = made(tmp_path, name, CONFIGS[name])
    readers = [partial(load_config, kind, path) for kind in (PretrainConfig, FinetuneConfig)]
    readers.append(partial(command, "pretrain", "--config", path, "-o", "run"))
    for message in refusals(tmp_path, *readers):
        assert name in message


@pytest.mark.parametrize("value", [f"!!python/object/apply:os.system ['touch {CANARY}']", "[" * 5000])
def test_overrides(value, tmp_path):
    [message] = refusals(tmp_path, partial(load_config, PretrainConfig, overrides=[f"seed={value}"]))
    assert "seed" in message


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests(name, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"secret")
    folder = tmp_path / name
    folder.mkdir()
    made(folder, "manifest.json", MANIFESTS[name])
    [message] = refusals(tmp_path, partial(CrystalDataset.open, folder))
    assert name in message


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_crystals(name, tmp_path):
    path = made(tmp_path, name, PICKLES[name])
    [message] = refusals(tmp_path, partial(prepare, path, tmp_path / "dataset", workers=1))
    assert name in message


def state(**change):
    """Return a state.json with a right digest."""
    content = {"format": "mgt-fast run state", "version": 1, "step": 1, "tensors": {"bytes": 0, "sha256": ""}}
    content = {**content, "record": {}, **change}
    return json.dumps({**content, "sha256": _digest(content)})


STATES = {
    "pointer outside": (LATEST, "../../elsewhere"),
    "absolute pointer": (LATEST, "/dev/zero"),
    "long pointer": (LATEST, "step-" + "1" * 10**6),
    "pickle as state": (STATE, None),
    "pickle as tensors": (TENSORS, None),
    "deep state": (STATE, "[" * 200_000),
    "list": (STATE, "[]"),
    "large state": (STATE, " " * (2**24 + 1)),
    "endless tensors": (TENSORS, ("/dev/zero", state())),
    "claimed size": (STATE, state(tensors={"bytes": 2**62, "sha256": ""})),
    "text size": (STATE, state(tensors={"bytes": "9", "sha256": ""})),
    "path for a hash": (STATE, state(tensors={"bytes": 0, "sha256": ["elsewhere"]})),
    "other files": (STATE, state(tensors={"../../elsewhere": {}})),
    "no record": (STATE, state(record=["os.system"])),
}


@pytest.mark.parametrize("name", STATES)
def test_run_states(name, tmp_path):
    store = StateStore(tmp_path)
    folder = store.save(1, {}, {})
    file, content = STATES[name]
    path = store.folder / file if file == LATEST else folder / file
    path.unlink()
    if isinstance(content, tuple):
        path.symlink_to(content[0])
        (folder / STATE).write_text(content[1])
    elif content is None:
        path.write_bytes(CHECKPOINTS["pickle.safetensors"]())
    else:
        path.write_text(content)
    [message] = refusals(tmp_path, store.load)
    assert str(folder if file == STATE else path) in message


def test_there_are_enough_of_them(record_property):
    files = [*CHECKPOINTS, *CONFIGS, *MANIFESTS, *PICKLES, *STATES]
    record_property("files", len(files))
    assert len(files) >= 20


@pytest.mark.parametrize("name", ["pickle.safetensors", "pickle.pt", "protocol-5.pt"])
def test_the_code_is_live(name, tmp_path):
    """What the readers refuse would run if it were unpickled."""
    path = made(tmp_path, name, CHECKPOINTS[name])

    def load():
        os.chdir(tmp_path)
        pickle.loads(path.read_bytes())

    assert Child(load).result() is None
    assert (tmp_path / CANARY).exists()
