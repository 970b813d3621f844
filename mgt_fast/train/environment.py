"""Where and on what a run was begun: environment.json of its folder."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..data.manifest import MANIFEST, hash_file
from ..data.store import BUNDLED
from ..distributed import Ranks
from ..durable import replace_file
from ..roofs import device_name
from .config import RunConfig
from .setup import resolve_device

ENVIRONMENT = "environment.json"
_PACKAGES = ("mgt-fast", "torch", "triton", "numpy", "scipy", "e3nn", "pymatgen")


def record_environment(folder: Path, config: RunConfig, ranks: Ranks) -> None:
    """Write environment.json into a run folder that has none; a run that continues keeps its first."""
    file = folder / ENVIRONMENT
    if not file.exists():
        replace_file(file, (json.dumps(describe_environment(config, ranks), indent=2) + "\n").encode())


def describe_environment(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """Return what a result may depend on beside its configuration.

    Returns:
        That of `describe_machine`; "ranks"; and "dataset": SHA-256 of its manifest.
    """
    return {
        **describe_machine(resolve_device(config.device)),
        "ranks": ranks.size,
        "dataset": hash_file((config.data.path or BUNDLED) / MANIFEST),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what computes: program and machine.

    Returns:
        "date" (UTC), "versions" by package (None: not installed) and "python", "system", "device",
        "threads", and "commit" of the source (None unless it is a checkout).
    """
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": _commit(Path(__file__).parents[2]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """Return the commit of the checkout at `root`, with "+" if files differ from it."""
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    except (OSError, subprocess.CalledProcessError):  # no git here, or a repository it does not trust
        return None
    return commit.stdout.strip() + ("+" if changed.returncode else "")
