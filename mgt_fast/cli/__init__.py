"""The command line: `mgt-fast prepare, pretrain, finetune, ...`; a module a group of commands.

Commands import what they need when they run, so that `--help` is quick.
"""

from . import prepare, train, predict, router, protocols, demo  # noqa: I001  in the order of `--help`
from .common import app

__all__ = ["app", "demo", "predict", "prepare", "protocols", "router", "train"]
