"""The command line: `mgt-fast prepare, pretrain, finetune, ...`; a module a group of commands.

Commands import what they need when they run, so that `--help` is quick.
"""

from . import prepare, train, predict, report, studies, router, protocols, demo  # noqa: I001  as in --help
from .common import app

__all__ = ["app", "demo", "predict", "prepare", "protocols", "report", "router", "studies", "train"]
