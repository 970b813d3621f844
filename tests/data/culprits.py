"""What worker processes die of; a module of its own, because they import it."""

import os
import re
import signal
import time
from dataclasses import dataclass

from mgt_fast.data.parse import parse_chunk


@dataclass(frozen=True)
class Culprit:
    """A payload that does to its worker what a crashing, hanging or greedy parser would."""

    what: str

    def crystal(self):
        match self.what:
            case "crashes":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exits":
                os._exit(1)
            case "sleeps":
                time.sleep(60)
            case "computes":
                re.match("(a*)*b", "a" * 40)  # never returns to the interpreter
            case "hoards":
                bytearray(2**31)
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)


def lost_over_all_of(records, options, watch):
    """Fail over the work on all records together as long as the one named "greedy" is among them."""
    parsed = parse_chunk(records, options, watch)
    if any(record.id == "greedy" for record in records):
        os.kill(os.getpid(), signal.SIGPROF)
    return parsed
