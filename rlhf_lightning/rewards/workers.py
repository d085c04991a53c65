"""Worker processes that can be killed at any moment, for work that may hang, blow up or crash.

Some questions about a model's output have no bound in time or memory: is this expression equal to
that one, does this pattern match. A timeout by signal works on the main thread only and cannot stop
C code, and a thread cannot be stopped at all. So the work is done in processes, watched from
outside, and each item of work costs at most its limit.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import math
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from signal import Signals
from typing import Any

_CHILD = str(Path(__file__).with_name("_worker.py"))
# Run by path without its folder on sys.path: that folder has a math.py of its own.
_BOOT = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
# A worker sees no secret of the trainer's environment. A fixed hash seed makes sympy repeatable.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_FIXED = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

_MAX_MESSAGE = 64 << 20  # bytes
_CHUNK_ITEMS, _CHUNK_BYTES = 8, 64 << 10  # what a worker may hold unanswered
_MAX_ATTEMPTS = 2  # a first death may be anybody's doing, a second on a fresh worker is the item's
_MAX_DEATHS = 20  # worker deaths in a row, with no answer in between, that stop a round


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

    Workers start at the first :meth:`map`, by ``subprocess`` (the trainer is never forked), and live
    until :meth:`close`, the end of this process (also by ``kill -9``, on Linux) or the collection of
    the pool. :meth:`map` may be called from any thread. A copy of the pool, by pickle, ``deepcopy``
    or fork, starts workers of its own.

    The files of ``task`` and ``start`` are loaded in the workers by themselves, without the packages
    above them, so they should import absolutely and little. Items and values are JSON.

    Args:
        task: ``"module:function"``, called with one item at a time.
        start: ``"module:function"``, called once in each new worker.
        start_args: what ``start`` is called with.
        workers: how many processes; None for the processors of this process, at most 8.
        timeout: seconds of wall-clock time for one item.
        memory_bytes: address space of one worker.
        start_timeout: seconds that a worker may take to start.
    """

    def __init__(
        self,
        task: str,
        start: str | None = None,
        start_args: Sequence[Any] = (),
        workers: int | None = None,
        timeout: float = 2.0,
        memory_bytes: int = 2 << 30,
        start_timeout: float = 120.0,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1, or None to choose")
        _check_seconds("timeout", timeout)
        _check_seconds("start_timeout", start_timeout)
        if memory_bytes < 64 << 20:
            raise ValueError(f"memory_bytes is {memory_bytes}; Python alone needs {64 << 20}")
        self.task = task
        self.start = start
        self.start_args = tuple(start_args)
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
            message = _pack({"ticket": ticket, "item": item, "timeout": limit})
            if len(message) > _MAX_MESSAGE:
                raise ValueError(f"item {ticket} is {len(message)} bytes; the most is 64 MiB")
            messages.append(message)
        with self._lock:
            return _Round(self, messages, limit).run()

    def close(self) -> None:
        """Kill the workers. The pool may be used again, and then starts new ones."""
        with self._lock:
            _kill_all(self._running)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.process.pid for worker in self._running]

    def _size(self) -> int:
        return min(8, usable_cpus()) if self.workers is None else self.workers

    def _spawn(self) -> None:
        self._running.append(_Worker(self))

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._running: list[_Worker] = []
        # The list, not the pool, is what the finalizer holds; a forked child's copy must not kill.
        weakref.finalize(self, _kill_all, self._running, os.getpid())
        _POOLS.add(self)

    def _abandon(self) -> None:
        """Forget the workers in a child after a fork: they answer to the parent."""
        for worker in self._running:
            worker.channel.close()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()


class _Worker:
    """One process and what it has been given. ``tickets`` are unanswered, the first in hand."""

    def __init__(self, pool: WorkerPool) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-c", _BOOT, _CHILD, str(theirs.fileno())]
            self.process = _spawn_process(argv, theirs.fileno())
        self.channel.setblocking(False)
        self.ready = False
        self.failure = ""
        self.tickets: deque[int] = deque()
        self.deadline = time.monotonic() + pool.start_timeout
        self._inbox = bytearray()
        self._outbox = bytearray()
        setup = {
            "parent": os.getpid(),
            "memory_bytes": pool.memory_bytes,
            "sys_path": [path or os.getcwd() for path in sys.path],
            "task": _locate("task", pool.task),
            "start": _locate("start", pool.start) if pool.start else None,
            "start_args": pool.start_args,
        }
        self.write(_pack(setup))

    @property
    def writing(self) -> bool:
        return bool(self._outbox)

    def give(self, tickets: Sequence[int], messages: Sequence[bytes], limit: float) -> None:
        self.tickets.extend(tickets)
        self.deadline = time.monotonic() + limit
        self.write(b"".join(messages))

    def write(self, data: bytes = b"") -> None:
        """Send what fits; a broken channel shows when it is read."""
        self._outbox += data
        try:
            while self._outbox:
                del self._outbox[: self.channel.send(self._outbox[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have arrived in full, and whether the worker is still there."""
        alive = True
        try:
            while True:
                data = self.channel.recv(1 << 16)
                if not data:
                    alive = False
                    break
                self._inbox += data
        except BlockingIOError:
            pass
        except OSError:
            alive = False
        messages = []
        while len(self._inbox) >= 4:
            (size,) = struct.unpack_from(">I", self._inbox)
            if size > _MAX_MESSAGE:
                return messages, False
            if len(self._inbox) < 4 + size:
                break
            messages.append(json.loads(bytes(self._inbox[4 : 4 + size])))
            del self._inbox[: 4 + size]
        return messages, alive

    def kill(self) -> int:
        """End the process if it has not ended; its exit status."""
        self.channel.close()
        self.process.kill()
        return self.process.wait()


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
        finally:
            for worker in list(self.pool._running):
                if worker.tickets or worker.writing:  # left early: its answers would be stale
                    self._dismiss(worker)
        return [self.results[ticket] for ticket in range(len(self.messages))]

    def _staff(self) -> None:
        wanted = min(self.pool._size(), len(self.messages) - len(self.results))
        while len(self.pool._running) < wanted:
            self.pool._spawn()

    def _feed(self) -> None:
        idle = [w for w in self.pool._running if w.ready and not w.tickets]
        for worker in idle:
            share = math.ceil(len(self.waiting) / (2 * self.pool._size()))
            tickets: list[int] = []
            size = 0
            while self.waiting and len(tickets) < min(share, _CHUNK_ITEMS) and size < _CHUNK_BYTES:
                if tickets and self.attempts[self.waiting[0]]:
                    break  # under suspicion: alone, so that nobody waits behind it
                tickets.append(self.waiting.popleft())
                size += len(self.messages[tickets[-1]])
                if self.attempts[tickets[-1]]:
                    break
            if tickets:
                worker.give(tickets, [self.messages[t] for t in tickets], self.limit)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in self.pool._running:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.writing else 0)
                selector.register(worker.channel, events, worker)
            busy = [w.deadline for w in self.pool._running if w.tickets or not w.ready]
            patience = max(0.0, min(busy) - time.monotonic()) if busy else 0.0
            for key, events in selector.select(patience):
                if events & selectors.EVENT_WRITE:
                    key.data.write()
                if events & selectors.EVENT_READ:
                    self._hear(key.data)

    def _hear(self, worker: _Worker) -> None:
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
                self.results[worker.tickets.popleft()] = _as_result(message, self.pool)
        if not alive:
            self._bury(worker)

    def _enforce(self) -> None:
        now = time.monotonic()
        for worker in list(self.pool._running):
            if now < worker.deadline or (worker.ready and not worker.tickets):
                continue
            if not worker.ready:
                self._dismiss(worker)
                raise WorkerPoolError(
                    f"a worker for {self.pool.task} did not start in {self.pool.start_timeout} s"
                )
            late = worker.tickets.popleft()
            self.results[late] = WorkerResult(
                Outcome.TIMEOUT, error=f"killed after {self.limit:g} s"
            )
            self._dismiss(worker)

    def _bury(self, worker: _Worker) -> None:
        """A worker has died: settle what it had in hand."""
        suspect = worker.tickets.popleft() if worker.tickets else None
        status = self._dismiss(worker)
        if suspect is None and worker.ready:
            return  # idle, or it left after it ran out of memory
        if status == -Signals.SIGXCPU and suspect is not None:
            error = f"more than {self.limit:g} s of processor time"
            self.results[suspect] = WorkerResult(Outcome.TIMEOUT, error=error)
            return
        self.deaths += 1
        if self.deaths >= _MAX_DEATHS:
            raise WorkerPoolError(
                f"{self.deaths} workers for {self.pool.task} died in a row (the last with exit"
                f" status {status}) and none answered. Is the machine out of memory?"
            )
        if suspect is None:
            return
        self.attempts[suspect] += 1
        if self.attempts[suspect] < _MAX_ATTEMPTS:
            self.waiting.appendleft(suspect)
        else:
            error = f"{_MAX_ATTEMPTS} workers died on it, the last with exit status {status}"
            self.results[suspect] = WorkerResult(Outcome.CRASH, error=error)

    def _dismiss(self, worker: _Worker) -> int:
        """Kill a worker and put what it had not begun back in front."""
        self.waiting.extendleft(reversed(worker.tickets))
        worker.tickets.clear()
        self.pool._running.remove(worker)
        return worker.kill()


def _as_result(message: dict[str, Any], pool: WorkerPool) -> WorkerResult:
    if "value" in message:
        return WorkerResult(Outcome.DONE, value=message["value"])
    if "out_of_memory" in message:
        error = f"more than {pool.memory_bytes >> 20} MiB"
        return WorkerResult(Outcome.OUT_OF_MEMORY, error=error)
    return WorkerResult(Outcome.ERROR, error=str(message.get("error")))


def _check_seconds(name: str, value: float) -> None:
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name} is {value!r}; it must be a positive number of seconds")


def _pack(message: dict[str, Any]) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def _locate(argument: str, target: str) -> tuple[str, str, str]:
    """``(module, its file, function)`` of a ``"module:function"``."""
    module, _, function = target.partition(":")
    spec = importlib.util.find_spec(module) if module and function else None
    if spec is None or spec.origin is None:
        raise ValueError(f"{argument} is {target!r}; it must be 'module:function' with a file")
    return module, spec.origin, function


def _kill_all(workers: list[_Worker], owner: int | None = None) -> None:
    if owner is None or owner == os.getpid():
        while workers:
            workers.pop().kill()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_starter: ThreadPoolExecutor | None = None
_starter_lock = threading.Lock()


def _spawn_process(argv: list[str], descriptor: int) -> subprocess.Popen[bytes]:
    """Start a process from a thread that lives as long as this process does.

    Linux sends the death signal when the *thread* that started a child ends, and ``map`` may be
    called from a short-lived one.
    """
    global _starter
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | _FIXED

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            argv,
            env=environment,
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    with _starter_lock:
        if _starter is None:
            _starter = ThreadPoolExecutor(1, thread_name_prefix="worker-starter")
        return _starter.submit(start).result()


def _after_fork() -> None:
    global _starter, _starter_lock
    _starter, _starter_lock = None, threading.Lock()
    for pool in list(_POOLS):
        pool._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: [pool.close() for pool in list(_POOLS)])
