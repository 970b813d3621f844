"""Disks that fail and processes that die, at a chosen operation of the operating system.

MGT_FAST_FAULTS is how many cases a test tries where it could try more; "all" is every one, or as many as
docs/reliability.md reports (`make reliability`).
"""

import errno
import json
import os
import signal
import traceback
import warnings
from contextlib import contextmanager

import pytest

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
# What changes a disk; the last two free room on it.
OPERATIONS = ("open", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "unlink", "rmdir")
FREEING = ("unlink", "rmdir")
PATIENCE = 60  # seconds that a child may take


def count(usual, full):
    """Return how many cases a test tries: `usual`, or as many as MGT_FAST_FAULTS asks for, at most `full`."""
    wanted = os.environ.get("MGT_FAST_FAULTS", str(usual))
    return full if wanted == "all" else min(full, int(wanted))


def points(total):
    """Return some of range(total), evenly spread, the first and the last among them; see `count`."""
    number = min(total, max(2, count(10, total)))
    return sorted({round(i * (total - 1) / max(1, number - 1)) for i in range(number)})


@contextmanager
def watched(act=lambda number, name: None):
    """Call `act(number, name)` before every operation that changes the disk; syncing itself is left out.

    For a write `act` may return True: then only half of it is done, and `act(number, "torn")` follows.
    Yields the list of the operations done.
    """
    done = []
    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, _watched(name, getattr(os, name), act, done))
        yield done


def _watched(name, real, act, done):
    def operation(*arguments, **options):
        if name == "open" and not arguments[1] & (os.O_CREAT | os.O_TRUNC):
            return real(*arguments, **options)
        done.append(name)
        number = len(done) - 1
        if act(number, name):
            real(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))
            act(number, "torn")
        return None if name == "fsync" else real(*arguments, **options)

    return operation


def failing(at, code, stays=False):
    """Return an `act` that fails at an operation and, if the fault stays, at later ones that need room."""

    def act(number, name):
        if number == at or (stays and number > at and name not in FREEING):
            raise OSError(code, os.strerror(code))

    return act


def killing(at, torn=False):
    """Return an `act` that kills the process before an operation, or in the middle of it if it is a write."""

    def act(number, name):
        if number == at and torn and name == "write":
            return True
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    return act


class Child:
    """A forked process that runs a function and hands its result back as JSON."""

    def __init__(self, run):
        self._end, end = os.pipe()
        with warnings.catch_warnings():  # Python 3.12 warns where other threads run; ours need none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            try:
                signal.alarm(PATIENCE)
                os.close(self._end)
                text = json.dumps(run())
                with open(end, "w") as stream:
                    stream.write(text)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(end)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def result(self):
        """Return what the function returned; None if the process was killed."""
        with open(self._end) as stream:
            text = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        assert status in (0, -signal.SIGKILL), f"exit status {status}"
        return json.loads(text) if text else None
