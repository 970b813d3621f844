"""Worker processes that may die: each item they are given has a limit of time and of memory.

The limits are the kernel's and so hold inside C libraries, whatever they do: timers whose signal ends the
process, and a bound on its address space. A worker that has died is replaced, and what it died of is told.
"""

from __future__ import annotations

import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from queue import SimpleQueue
from typing import Any

LOOK_AHEAD = 4  # tasks a worker that may wait or be waited for


@dataclass(frozen=True)
class Limits:
    """What one item may take.

    Attributes:
        seconds: processor time.
        stall: time on the clock, s; generous, so that a busy machine harms no item.
        memory: bytes of address space beyond those the process has when the item's turn begins.
    """

    seconds: float = 5.0
    stall: float = 60.0
    memory: int = 2**30


class LostError(Exception):
    """A task that was not finished because of one of its items.

    Attributes:
        position: of the item; the number of items if it was the work on all of them together.
        reason: "timeout", "out_of_memory", "parser_failure" or "unreadable_record".
        message: the same in words.
    """

    def __init__(self, position: int, reason: str, message: str):
        super().__init__(position, reason, message)  # all three, so that it survives pickling
        self.position, self.reason, self.message = position, reason, message


# A task: it works on its items one after the other and says before each, and before what it does with all of
# them together, which one it is. The second argument is what all tasks of a pool have in common.
Task = Callable[[Sequence, Any, Callable[[int], None]], Any]


class WorkerPool:
    """Worker processes for one kind of task; a context manager.

    Processes are forks of a server that has imported the task's module, because threads of this process
    (torch) forbid to fork it.

    Args:
        workers: number of processes.
        task: what they do.
        common: its second argument.
        limits: of each item.
    """

    def __init__(self, workers: int, task: Task, common: Any, limits: Limits):
        self.workers = workers
        self._make = lambda: _Worker(task, common, limits)
        self._closed = False

    def __enter__(self) -> WorkerPool:
        self._threads = ThreadPoolExecutor(self.workers)
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker | None] = SimpleQueue()
        for _ in range(self.workers):
            self._idle.put(None)  # started when needed
        return self

    def __exit__(self, *_) -> None:
        self._closed = True
        for worker in self._all:
            worker.end()  # whoever waits for its answer goes on
        self._threads.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Callable], Any], tasks: Iterable[Sequence]) -> Iterator[tuple]:
        """Yield (items, function(call, items)) of every task in order; `call(items)` works in a process.

        It raises LostError if the process dies of an item.
        """
        pending: deque = deque()
        for items in tasks:
            pending.append((items, self._threads.submit(self._run, function, items)))
            if len(pending) >= LOOK_AHEAD * self.workers:
                items, future = pending.popleft()
                yield items, future.result()
        while pending:
            items, future = pending.popleft()
            yield items, future.result()

    def _run(self, function: Callable, items: Sequence) -> Any:
        worker = self._idle.get()

        def call(items: Sequence) -> Any:
            nonlocal worker
            if self._closed:
                raise RuntimeError("the pool was closed")
            if worker is None:
                worker = self._make()
                self._all.append(worker)
            try:
                return worker(items)
            except LostError:
                if not worker.alive:
                    self._all.remove(worker)
                    worker = None
                raise

        try:
            return function(call, items)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process and the connection to it."""

    def __init__(self, task: Task, common: Any, limits: Limits):
        context = get_context("forkserver")
        context.set_forkserver_preload([task.__module__])
        self.limits = limits
        self.connection, theirs = context.Pipe()
        self.position = context.RawValue("q", 0)
        arguments = (theirs, self.position, task, common, limits)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.connection.recv()  # it is ready
        except (EOFError, OSError) as error:
            self.process.join()
            raise RuntimeError(
                f"a worker process ended with exit status {self.process.exitcode} before it could begin; its "
                'error is shown above. A script must guard its main part with if __name__ == "__main__":'
            ) from error

    @property
    def alive(self) -> bool:
        return not self.connection.closed

    def __call__(self, items: Sequence) -> Any:
        try:
            self.connection.send(items)
            succeeded, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._lost() from error
        except RecursionError as error:  # nothing was sent
            message = "it is nested too deeply to be handed to a worker"
            raise LostError(len(items), "unreadable_record", message) from error
        if succeeded:
            return answer
        raise answer

    def _lost(self) -> LostError:
        self.connection.close()
        self.process.join()
        code = self.process.exitcode
        if code == -signal.SIGPROF:
            what = "timeout", f"it took more than {self.limits.seconds:g} s of processor time"
        elif code == -signal.SIGALRM:
            what = "timeout", f"it took more than {self.limits.stall:g} s"
        elif code == -signal.SIGKILL:
            what = "out_of_memory", "its process was killed, as Linux does when memory runs out"
        else:
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            what = "parser_failure", f"the parser crashed ({name})"
        return LostError(self.position.value, *what)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection, position, task: Task, common: Any, limits: Limits) -> None:
    """Work on tasks until the parent ends or closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    for alarm in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(alarm, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    watch = _Watch(position, limits)
    connection.send("ready")
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = True, task(items, common, watch)
        except Exception as error:
            answer = False, error
        finally:
            watch.rest()
        connection.send(answer)


class _Watch:
    """Tells the parent which item begins and sets its limits."""

    def __init__(self, position, limits: Limits):
        self.position, self.limits = position, limits
        self.statm = os.open("/proc/self/statm", os.O_RDONLY)
        self.page = resource.getpagesize()
        self.hard = resource.getrlimit(resource.RLIMIT_AS)[1]

    def __call__(self, position: int) -> None:
        self.position.value = position
        used = int(os.pread(self.statm, 64, 0).split()[0]) * self.page
        self._limit(self.limits.seconds, self.limits.stall, used + self.limits.memory)

    def rest(self) -> None:
        self._limit(0, 0, self.hard)

    def _limit(self, seconds: float, stall: float, memory: int) -> None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, stall)
        if self.hard != resource.RLIM_INFINITY:
            memory = min(memory, self.hard)
        resource.setrlimit(resource.RLIMIT_AS, (memory, self.hard))
