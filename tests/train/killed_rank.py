"""What torchrun starts: mgt-fast on every rank, one of which dies at a moment and leaves the time of it."""

import json
import os
import sys
import time
from pathlib import Path

os.fsync = lambda file: None
sys.path.insert(0, str(Path(__file__).parents[1]))

import small_runs  # noqa: E402

from mgt_fast.cli import app  # noqa: E402


def main(plan, *arguments):
    """Run mgt-fast with these arguments.

    Args:
        plan: JSON text: "rank" that dies, "moment" as keywords of `small_runs.moments`, "file" for the time.
        arguments: of the command line.
    """
    plan = json.loads(plan)
    sys.argv = ["mgt-fast", *arguments]
    if int(os.environ["RANK"]) != plan["rank"]:
        app()
    die = small_runs.die

    def die_and_tell():
        Path(plan["file"]).write_text(str(time.time()))
        die()

    small_runs.die = die_and_tell
    with small_runs.moments(**plan["moment"]):
        app()


if __name__ == "__main__":
    main(*sys.argv[1:])
