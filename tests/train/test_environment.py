"""What a run says about where it was begun."""

import hashlib
import json
import subprocess

import pytest
import torch
from small_runs import run

from mgt_fast.data import CrystalDataset
from mgt_fast.distributed import Ranks
from mgt_fast.train import environment
from mgt_fast.train.config import FinetuneConfig


def test_a_run_keeps_its_first_environment(tmp_path, monkeypatch):
    run("finetune", tmp_path / "run")
    file = tmp_path / "run" / "environment.json"
    first = json.loads(file.read_text())
    manifest = CrystalDataset.open().path / "manifest.json"
    assert first["dataset"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert (first["versions"]["torch"], first["threads"], first["ranks"]) == (torch.__version__, 1, 1)

    monkeypatch.setattr(environment.time, "strftime", lambda *_: "later")
    run("finetune", tmp_path / "run", resume=True)
    assert json.loads(file.read_text()) == first
    run("finetune", tmp_path / "run", overwrite=True)
    assert json.loads(file.read_text()) == first | {"date": "later"}


def test_the_commit_says_whether_files_differ_from_it(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment._commit(tmp_path) is None
    git("init")
    assert environment._commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert environment._commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert environment._commit(tmp_path) == f"{head}+"


@pytest.mark.parametrize("error", [FileNotFoundError("git"), PermissionError("git")])
def test_no_git_is_no_fault(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(environment.subprocess, "run", fail)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "a" / "b" / "environment.py"))
    assert environment.describe_environment(FinetuneConfig(), Ranks())["commit"] is None
