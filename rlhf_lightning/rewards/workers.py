"""Worker processes that can be killed at any moment, for work that may hang, blow up or crash.

Some questions about a model's output have no bound in time or memory: is this expression equal to
that one, does this pattern match. A timeout by signal works on the main thread only and cannot stop
C code, and a thread cannot be stopped at all. So the work is done in processes, watched from
outside, and each item of work costs at most its limit.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rlhf_lightning.rewards._worker_process import (
    MAX_MESSAGE,
    WorkerProcess,
    forget_starter,
    locate,
    pack,
)

_CHUNK_ITEMS, _CHUNK_BYTES = 8, 64 << 10  # what a worker may hold unanswered
_MAX_ATTEMPTS = 2  # a first death may be anybody's doing, a second on a fresh worker is the item's
_PATIENCE = 1.0  # seconds to wait for a round to end before its workers are left alone
_MAX_DEATHS = 20  # deaths in a row, with no answer in between, that stop a round


class WorkerPoolError(RuntimeError):
    """The pool itself cannot work: its workers do not start, or die whatever they are given."""


class Outcome(str, Enum):
    """How one item of work ended."""

    DONE = "done"
    ERROR = "error"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    CRASH = "crash"


@dataclass(frozen=True)
class WorkerResult:
    """What became of one item.

    Attributes:
        outcome: ``DONE``; ``ERROR`` where the task raised; ``TIMEOUT`` where it was killed at its
            limit; ``OUT_OF_MEMORY`` at the memory limit; ``CRASH`` where it took two workers down.
        value: what the task returned.
        error: what went wrong, in words.
    """

    outcome: Outcome
    value: Any = None
    error: str = ""


def usable_cpus() -> int:
    """Processors that this process may keep busy: its share, where a launcher started several."""
    count = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class WorkerPool:
    """Runs ``task(item)`` over items in killable processes; each item gets exactly one result.

    Workers start at the first :meth:`map`, by ``subprocess`` (the trainer is never forked), and
    live until :meth:`close`, the collection of the pool or the end of this process (on Linux also
    by ``kill -9``). :meth:`map` may be called from any thread. A copy of the pool, by pickle,
    ``deepcopy`` or fork, starts workers of its own.

    The files of ``task`` and ``setup`` are loaded in the workers by themselves, without the
    packages above them, so they should import absolutely and little. Items and values are JSON.
    Workers see ``PATH``, ``HOME`` and the locale of the environment, and none of its secrets.

    Args:
        task: ``"module:function"``, called with one item at a time.
        setup: ``"module:function"``, called once in each new worker.
        setup_args: what ``setup`` is called with.
        workers: how many processes; None for the processors of this process, at most 8.
        timeout: seconds of wall-clock time for one item.
        memory_bytes: address space of one worker (Linux).
        start_timeout: seconds that a worker may take to start.
    """

    def __init__(
        self,
        task: str,
        setup: str | None = None,
        setup_args: Sequence[Any] = (),
        workers: int | None = None,
        timeout: float = 2.0,
        memory_bytes: int = 2 << 30,
        start_timeout: float = 120.0,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1, or None to choose")
        if memory_bytes < 64 << 20:
            raise ValueError(f"memory_bytes is {memory_bytes}; Python alone needs {64 << 20}")
        _check_seconds("timeout", timeout)
        _check_seconds("start_timeout", start_timeout)
        locate("task", task)
        if setup is not None:
            locate("setup", setup)
        self.task = task
        self.setup = setup
        self.setup_args = tuple(setup_args)
        self.workers = workers
        self.timeout = timeout
        self.memory_bytes = memory_bytes
        self.start_timeout = start_timeout
        self._reset()

    def map(self, items: Sequence[Any], timeout: float | None = None) -> list[WorkerResult]:
        """Run the task on every item.

        Args:
            items: JSON values.
            timeout: seconds for one item, in place of the pool's.

        Returns:
            One result an item, in their order.

        Raises:
            WorkerPoolError: where workers cannot start, or die one after the other.
            ValueError: where an item is larger than 64 MiB or the timeout is not positive.
        """
        limit = self.timeout if timeout is None else timeout
        _check_seconds("timeout", limit)
        messages = []
        for ticket, item in enumerate(items):
            message = pack({"ticket": ticket, "item": item, "timeout": limit})
            if len(message) > MAX_MESSAGE:
                raise ValueError(f"item {ticket} is {len(message)} bytes; the most is 64 MiB")
            messages.append(message)
        with self._lock:
            return _Round(self, messages, limit).run()

    def close(self) -> None:
        """Kill the workers. The pool may be used again, and then starts new ones.

        Where another thread is using them they stay, for a run that is stopped does not wait.
        """
        if self._lock.acquire(timeout=_PATIENCE):
            try:
                _kill_all(self._running, os.getpid())
            finally:
                self._lock.release()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._running]

    @property
    def size(self) -> int:
        """How many workers there are at most."""
        return min(8, usable_cpus()) if self.workers is None else self.workers

    def _spawn(self) -> None:
        instructions = {
            "memory_bytes": self.memory_bytes,
            "task": locate("task", self.task),
            "setup": locate("setup", self.setup) if self.setup else None,
            "setup_args": self.setup_args,
        }
        self._running.append(WorkerProcess(instructions, self.start_timeout))

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._running: list[WorkerProcess] = []
        weakref.finalize(self, _kill_all, self._running, os.getpid())
        _POOLS.add(self)

    def _abandon(self) -> None:
        """Forget the workers, in a child after a fork: they answer to the parent."""
        for worker in self._running:
            worker.channel.close()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()


class _Round:
    """One call of :meth:`WorkerPool.map`."""

    def __init__(self, pool: WorkerPool, messages: list[bytes], limit: float) -> None:
        self.pool = pool
        self.messages = messages
        self.limit = limit
        self.results: dict[int, WorkerResult] = {}
        self.waiting = deque(range(len(messages)))
        self.attempts = [0] * len(messages)
        self.deaths = 0

    def run(self) -> list[WorkerResult]:
        """Drive the workers until each item has its result."""
        try:
            while len(self.results) < len(self.messages):
                self._staff()
                self._feed()
                self._listen()
                self._enforce()
        except BaseException:
            for worker in list(self.pool._running):
                if worker.tickets or not worker.ready:  # its answers would be stale
                    self._dismiss(worker)
            raise
        return [self.results[ticket] for ticket in range(len(self.messages))]

    def _staff(self) -> None:
        wanted = min(self.pool.size, len(self.messages) - len(self.results))
        while len(self.pool._running) < wanted:
            self.pool._spawn()

    def _feed(self) -> None:
        share = min(_CHUNK_ITEMS, math.ceil(len(self.waiting) / (2 * self.pool.size)))
        for worker in self.pool._running:
            if not worker.ready or worker.tickets:
                continue
            tickets: list[int] = []
            size = 0
            while self.waiting and len(tickets) < share and size < _CHUNK_BYTES:
                # An item that a worker died on goes alone, so that nobody waits behind it.
                suspect = self.attempts[self.waiting[0]] > 0
                if suspect and tickets:
                    break
                tickets.append(self.waiting.popleft())
                size += len(self.messages[tickets[-1]])
                if suspect:
                    break
            if tickets:
                worker.give(tickets, [self.messages[ticket] for ticket in tickets], self.limit)

    def _listen(self) -> None:
        """Wait for news until the next deadline."""
        with selectors.DefaultSelector() as selector:
            for worker in self.pool._running:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.writing else 0)
                selector.register(worker.channel, events, worker)
            deadlines = [w.deadline for w in self.pool._running if w.tickets or not w.ready]
            patience = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
            for key, events in selector.select(patience):
                if events & selectors.EVENT_WRITE:
                    key.data.write()
                if events & selectors.EVENT_READ:
                    self._hear(key.data)

    def _hear(self, worker: WorkerProcess) -> None:
        messages, alive = worker.read()
        for message in messages:
            if "ready" in message:
                worker.ready = True
            elif "failed" in message:
                raise WorkerPoolError(
                    f"a worker for {self.pool.task} could not start:\n{message['failed']}"
                )
            elif not worker.tickets or message["ticket"] != worker.tickets[0]:
                alive = False  # out of step: nothing more that it says can be trusted
                break
            else:
                worker.deadline = time.monotonic() + self.limit
                self.deaths = 0
                self.results[worker.tickets.popleft()] = self._result(message)
                if "out_of_memory" in message:  # it leaves by itself, and the rest is not to blame
                    self._dismiss(worker)
                    return
        if not alive:
            self._bury(worker)

    def _result(self, message: dict[str, Any]) -> WorkerResult:
        if "value" in message:
            return WorkerResult(Outcome.DONE, value=message["value"])
        if "out_of_memory" in message:
            error = f"more than {self.pool.memory_bytes >> 20} MiB"
            return WorkerResult(Outcome.OUT_OF_MEMORY, error=error)
        return WorkerResult(Outcome.ERROR, error=str(message.get("error")))

    def _enforce(self) -> None:
        """Kill what is past its deadline."""
        for worker in list(self.pool._running):
            if not _is_late(worker):
                continue
            self._hear(worker)  # it may have answered while this thread was held up
            if worker not in self.pool._running or not _is_late(worker):
                continue
            if not worker.ready:
                seconds = self.pool.start_timeout
                raise WorkerPoolError(f"a worker for {self.pool.task} took {seconds:g} s to start")
            error = f"killed after {self.limit:g} s"
            self.results[worker.tickets.popleft()] = WorkerResult(Outcome.TIMEOUT, error=error)
            self._dismiss(worker)

    def _bury(self, worker: WorkerProcess) -> None:
        """A worker has died: settle what it had in hand."""
        suspect = worker.tickets.popleft() if worker.tickets else None
        was_idle = worker.ready and suspect is None
        status = self._dismiss(worker)
        if was_idle:
            return
        if suspect is not None and status == -signal.SIGXCPU:
            error = f"more than {self.limit:g} s of processor time"
            self.results[suspect] = WorkerResult(Outcome.TIMEOUT, error=error)
            return
        self.deaths += 1
        if self.deaths >= _MAX_DEATHS:
            raise WorkerPoolError(
                f"{self.deaths} workers for {self.pool.task} died in a row without an answer, the"
                f" last with exit status {status}. Is the machine out of memory?"
            )
        if suspect is None:
            return
        self.attempts[suspect] += 1
        if self.attempts[suspect] < _MAX_ATTEMPTS:
            self.waiting.appendleft(suspect)
        else:
            error = f"{_MAX_ATTEMPTS} workers died on it, the last with exit status {status}"
            self.results[suspect] = WorkerResult(Outcome.CRASH, error=error)

    def _dismiss(self, worker: WorkerProcess) -> int:
        """Kill a worker; what it had not answered goes back in front."""
        self.waiting.extendleft(reversed(worker.tickets))
        worker.tickets.clear()
        self.pool._running.remove(worker)
        return worker.kill()


def _is_late(worker: WorkerProcess) -> bool:
    waited_for = bool(worker.tickets) or not worker.ready
    return waited_for and time.monotonic() >= worker.deadline


def _check_seconds(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a positive number of seconds")


def _kill_all(workers: list[WorkerProcess], owner: int) -> None:
    """Kill the workers, unless this is a forked child that merely inherited their list."""
    while workers and owner == os.getpid():
        workers.pop().kill()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


def _after_fork() -> None:
    forget_starter()
    for pool in list(_POOLS):
        pool._abandon()


os.register_at_fork(after_in_child=_after_fork)
