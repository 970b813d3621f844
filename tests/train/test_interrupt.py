"""Signals between two steps, and in a step that never ends."""

import os
import signal
import time

import pytest
import torch.distributed as dist
from faults import Child

from mgt_fast.train.interrupt import StopRequest


def test_the_first_signal_is_remembered_and_the_second_acts():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest(limit=60.0) as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def stopped(work, number, tmp_path, limit=0.5):
    """Send a signal to a child within a `StopRequest`; return its exit status, last words and seconds."""
    ready = tmp_path / "ready"

    def run():
        os.dup2(os.open(tmp_path / "said", os.O_WRONLY | os.O_CREAT), 2)
        with StopRequest(limit, "rank 0 of 2") as stop:
            ready.touch()
            work(stop)
        time.sleep(2 * (limit or 0))
        os._exit(7)

    child = Child(run)
    while not ready.exists():
        time.sleep(0.001)
    time.sleep(0.1)
    started = time.monotonic()
    os.kill(child.pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    return status, (tmp_path / "said").read_text(), time.monotonic() - started


def wait_for_lost_rank(tmp_path):
    """Wait in a collective, where Python runs no handler."""
    store = dist.FileStore(str(tmp_path / "store"), 2)
    store.get("what only the other rank can tell")


def until_asked(stop):
    while stop.signal is None:
        time.sleep(0.001)


def test_a_step_that_waits_for_a_lost_rank_ends_after_the_limit(tmp_path):
    status, said, seconds = stopped(lambda stop: wait_for_lost_rank(tmp_path), signal.SIGTERM, tmp_path)
    assert status == 128 + signal.SIGTERM
    assert said == (
        "rank 0 of 2 was asked to stop (SIGTERM), but 0.5 s later its step has not ended: it may wait for a "
        "rank that is gone. Exiting; continue with --resume\n"
    )
    assert 0.5 <= seconds < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_step_that_ends_in_time_is_left_alone(number, tmp_path):
    assert stopped(until_asked, number, tmp_path)[:2] == (7, "")


def test_a_warning_ahead_of_time_has_no_limit(tmp_path):
    def long_step(stop):
        until_asked(stop)
        time.sleep(1.5)

    assert stopped(long_step, signal.SIGUSR1, tmp_path)[:2] == (7, "")


def test_a_single_rank_has_no_limit(tmp_path):
    def long_step(stop):
        until_asked(stop)
        time.sleep(0.5)

    assert stopped(long_step, signal.SIGTERM, tmp_path, limit=None)[:2] == (7, "")
