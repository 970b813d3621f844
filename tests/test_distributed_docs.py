"""What docs/distributed.md tells users to type: the Slurm script does as it says, and every option exists."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import typer
from torch.distributed.run import get_args_parser

from mgt_fast.cli import app
from mgt_fast.train.config import FinetuneConfig, PretrainConfig, load_config

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "slurm" / "pretrain.sbatch"
TEXT = (DOCS / "distributed.md").read_text()
FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo machine-1; else echo "$@" >> "$NOTES/scontrol"; fi',
    # A signal to srun reaches the task, which then saves for a while.
    "srun": """
        trap 'sleep 0.3; echo saved > "$NOTES/state"; exit 1' USR1
        printf '%s\\n' "$@" > "$NOTES/srun"
        if [ "$OUTCOME" = waits ]; then while :; do sleep 0.05; done; fi
        exit "$OUTCOME"
    """,
}


@pytest.fixture
def job(tmp_path):
    """Start the script as Slurm would, with programs that note how they are called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "machine-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "32",
        "NOTES": str(tmp_path),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }

    def start(outcome):
        command = ["bash", str(SCRIPT), "runs/pre", "--set", "data.path=oqmd"]
        return subprocess.Popen(command, env={**os.environ, **slurm, "OUTCOME": outcome})

    return start


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_time_limit_saves_and_requeues(job, tmp_path):
    process = job("waits")
    wait_for(tmp_path / "srun")
    time.sleep(0.2)  # until the script knows its task
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) != 0
    assert (tmp_path / "state").exists()
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("status", [0, 1])
def test_ended_job_is_not_requeued(job, tmp_path, status):
    assert job(str(status)).wait(30) == status
    assert not (tmp_path / "scontrol").exists()


def test_script_calls_torchrun_and_the_command(job, tmp_path):
    job("0").wait(30)
    called = (tmp_path / "srun").read_text().split()
    launcher = get_args_parser().parse_args(called[called.index("torchrun") + 1 :])
    assert (launcher.nnodes, launcher.nproc_per_node) == ("2", "8")
    assert launcher.rdzv_endpoint.startswith("machine-1:")
    assert launcher.no_python
    assert "SIGUSR1" in launcher.signals_to_handle.split(",")
    assert launcher.training_script == "mgt-fast"
    command, *arguments = launcher.training_script_args
    assert command == "pretrain"
    assert options_of(command) >= {text for text in arguments if text.startswith("--")}
    assert arguments[-2:] == ["--set", "data.path=oqmd"]


def options_of(command):
    found = typer.main.get_command(app).commands[command]
    return {option for parameter in found.params for option in parameter.opts}


def test_commands_have_the_options_that_are_named():
    lines = re.findall(r"(?:torchrun|--no-python)[^\n]* mgt-fast (\w+)([^\n]*)", TEXT)
    assert len(lines) >= 4
    for command, arguments in lines:
        assert options_of(command) >= set(re.findall(r"--[\w-]+", arguments))
    for command in ("evaluate", "predict"):
        assert "--device" in options_of(command)
    assert "--memory-gib" in options_of("predict")


def test_settings_that_are_named_exist():
    named = set(re.findall(r"\b(?:optim|data|checkpoint)\.[a-z_]+\b(?!\.)", TEXT)) | {"memory_gib", "threads"}
    assert {"optim.statistics", "data.resident", "checkpoint.every_minutes", "checkpoint.keep"} <= named
    for name in named:
        value = FinetuneConfig() if name == "data.target" else PretrainConfig()
        for part in name.split("."):
            assert hasattr(value, part), name
            value = getattr(value, part)
    for setting in set(re.findall(r"--set (\S+=[\w/.-]+)", TEXT)):
        kind = FinetuneConfig if "data.target" in setting else PretrainConfig
        load_config(kind, overrides=[setting])


def test_defaults_that_are_named():
    config = PretrainConfig()
    assert f"`checkpoint.every_minutes` ({config.checkpoint.every_minutes:g})" in TEXT
    assert f"`checkpoint.keep` ({config.checkpoint.keep})" in TEXT
    assert config.optim.statistics == "global"
    assert config.data.resident is None
