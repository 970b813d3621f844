import errno
import fcntl
import os
import re
import socket
import time

import pytest
from faults import Child, points

from mgt_fast.train.lock import LOCK, FolderLock, FolderLockedError


def together(count, run):
    """Run a function in children that begin at the same moment; return their results.

    The function gets another one, which waits until every child has called it.
    """
    (start, started), (here, arrived), (leave, left) = os.pipe(), os.pipe(), os.pipe()

    def begin():
        os.close(started)
        os.close(left)
        os.read(start, 1)  # comes back when the parent closes the other end

        def wait():
            os.write(arrived, b"x")
            os.read(leave, 1)

        return run(wait)

    children = [Child(begin) for _ in range(count)]
    os.close(arrived)
    os.close(started)
    for _ in range(count):
        os.read(here, 1)  # or none, if a child has died
    os.close(left)
    for end in (start, here, leave):
        os.close(end)
    return [child.result() for child in children]


def taking(folder):
    """Return what a child does: it tries to take the lock, and waits until all have tried."""

    def run(wait):
        try:
            with FolderLock(folder):
                wait()
                return os.getpid(), None
        except FolderLockedError as error:
            wait()
            return os.getpid(), str(error)

    return run


@pytest.mark.parametrize("count", range(2, 9))
def test_one_of_many_wins_and_the_others_name_it(count, tmp_path):
    for attempt in points(30):
        folder = tmp_path / f"run-{attempt}"
        found = together(count, taking(folder))
        [winner] = [pid for pid, message in found if message is None]
        for pid, message in found:
            if pid != winner:
                who = f"process {winner} on {re.escape(socket.gethostname())}"
                since = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"
                assert re.match(f"{folder} is being written by {who} since {since}; wait for it", message)
        assert list(folder.iterdir()) == []


def test_a_killed_holder_leaves_the_folder_free_and_is_not_taken_for_the_next(tmp_path):
    for _ in points(30):
        ready, end = os.pipe()

        def hold(ready=end):
            FolderLock(tmp_path).acquire()
            os.write(ready, b"x")
            time.sleep(60)

        holder = Child(hold)
        assert os.read(ready, 1) == b"x"
        with pytest.raises(FolderLockedError, match=f"process {holder.pid} on"):
            FolderLock(tmp_path).acquire()
        holder.kill()
        assert holder.result() is None
        assert (tmp_path / LOCK).exists()
        found = together(4, taking(tmp_path))
        [winner] = [pid for pid, message in found if message is None]
        assert sum(f"process {winner} on" in (message or "") for _, message in found) == 3
        os.close(ready)
        os.close(end)


def test_no_two_hold_it_at_once_while_it_changes_hands(tmp_path):
    """Each turn reads, waits and writes; a second holder would lose a turn."""
    turns, folder, counter = 12 * len(points(100)), tmp_path / "run", tmp_path / "counter"
    counter.write_text("0")

    def run(wait):
        done = 0
        while done < turns:
            try:
                with FolderLock(folder):
                    value = int(counter.read_text())
                    time.sleep(0)
                    counter.write_text(str(value + 1))
                    done += 1
            except FolderLockedError:
                pass
        wait()
        return done

    assert together(3, run) == [turns] * 3
    assert counter.read_text() == str(3 * turns)


def test_one_process_holds_it_once(tmp_path):
    lock = FolderLock(tmp_path / "new" / "run")
    with lock:
        assert (tmp_path / "new" / "run").is_dir()
        with pytest.raises(FolderLockedError, match=f"process {os.getpid()} on"):
            FolderLock(lock.folder).acquire()
        with pytest.raises(RuntimeError, match="is locked through this object already"):
            lock.acquire()
        assert (lock.folder / LOCK).exists()
    lock.release()
    with lock:
        pass
    assert list(lock.folder.iterdir()) == []


def test_forked_children_do_not_keep_it(tmp_path):
    """A data loader's worker that outlives its killed parent must not block the folder."""
    (end, go), (ready, here) = os.pipe(), os.pipe()

    def linger():
        os.close(go)
        os.read(end, 1)

    def hold():
        lock = FolderLock(tmp_path).acquire()
        worker = Child(linger)
        os.write(here, bytes([lock.path.exists()]))
        worker.result()

    holder = Child(hold)
    assert os.read(ready, 1) == b"\1"
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with FolderLock(tmp_path):
        pass
    for pipe in (end, go, ready, here):
        os.close(pipe)
    assert holder.result() is None


def test_a_forked_child_does_not_give_it_back(tmp_path):
    lock = FolderLock(tmp_path).acquire()

    def end():
        lock.release()
        return lock.path.exists()

    assert Child(end).result()
    with pytest.raises(FolderLockedError, match=f"process {os.getpid()} on"):
        FolderLock(tmp_path).acquire()
    lock.release()


def test_a_nameless_holder(tmp_path, monkeypatch):
    monkeypatch.setattr("mgt_fast.train.lock._PATIENCE", 0.1)
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderLockedError, match=r"by a process that .*\.lock does not name"):
            FolderLock(tmp_path).acquire()


def test_a_holder_on_another_machine_is_named(tmp_path):
    with (tmp_path / LOCK).open("w") as file:
        file.write('{"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(FolderLockedError, match="process 1 on elsewhere since 2026-01-01"):
            FolderLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match=r"has no locks \(Function not implemented\); mount it with locks"):
        FolderLock(tmp_path).acquire()
