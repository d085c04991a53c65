"""The parent's handle on one worker process: start it, write to it, read from it, kill it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MAX_MESSAGE = 64 << 20
"""Bytes of the largest message in either direction."""

_CHILD = str(Path(__file__).with_name("_worker.py"))
# Run by path without its folder on sys.path: that folder has a math.py of its own.
_BOOT = "import sys, runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
# A worker sees no secret of the trainer's environment. A fixed hash seed makes sympy repeatable.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_FIXED = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

_starter: ThreadPoolExecutor | None = None
_starter_lock = threading.Lock()


def pack(message: dict[str, Any]) -> bytes:
    """A message as it travels: JSON behind its length."""
    body = json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body


def locate(argument: str, target: str) -> tuple[str, str, str]:
    """``(module, its file, function)`` of a ``"module:function"``.

    Raises:
        ValueError: naming ``argument``, where there is no such module with a source file.
    """
    module, _, function = target.partition(":")
    try:
        spec = importlib.util.find_spec(module) if module and function else None
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.has_location or spec.origin is None:
        raise ValueError(
            f"{argument} is {target!r}; it must be 'module:function', the module a Python file"
        )
    return module, spec.origin, function


class WorkerProcess:
    """One process and what it has been given.

    Attributes:
        process: the process.
        channel: our end of the socket pair; never blocks.
        ready: whether it has started.
        tickets: items that it has not answered, in order; the first is in hand.
        deadline: by when (``time.monotonic``) it must have started, or answered the first of them.
    """

    def __init__(self, setup: dict[str, Any], start_timeout: float) -> None:
        self.channel, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-c", _BOOT, _CHILD, str(theirs.fileno())]
            self.process = _spawn(argv, theirs.fileno())
        self.channel.setblocking(False)
        self.ready = False
        self.tickets: deque[int] = deque()
        self.deadline = time.monotonic() + start_timeout
        self._inbox = bytearray()
        self._outbox = bytearray()
        path = [entry or os.getcwd() for entry in sys.path]
        self.write(pack({**setup, "parent": os.getpid(), "sys_path": path}))

    @property
    def writing(self) -> bool:
        """Whether part of what it was given has not left yet."""
        return bool(self._outbox)

    def give(self, tickets: Sequence[int], messages: Sequence[bytes], limit: float) -> None:
        """Hand over items, each with ``limit`` seconds."""
        self.tickets.extend(tickets)
        self.deadline = time.monotonic() + limit
        self.write(b"".join(messages))

    def write(self, data: bytes = b"") -> None:
        """Send what fits into the channel now. A broken channel shows when it is read."""
        self._outbox += data
        try:
            while self._outbox:
                del self._outbox[: self.channel.send(self._outbox[: 1 << 16])]
        except BlockingIOError:
            pass
        except OSError:
            self._outbox.clear()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have arrived in full, and whether the worker can still be trusted."""
        alive = True
        try:
            while data := self.channel.recv(1 << 16):
                self._inbox += data
            alive = False
        except BlockingIOError:
            pass
        except OSError:
            alive = False
        messages: list[dict[str, Any]] = []
        while len(self._inbox) >= 4:
            (size,) = struct.unpack_from(">I", self._inbox)
            if size > MAX_MESSAGE:
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


def _spawn(argv: list[str], descriptor: int) -> subprocess.Popen[bytes]:
    """Start a process from a thread that lives as long as this process does.

    Linux sends the death signal when the *thread* that started a child ends, and a pool may be
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


def forget_starter() -> None:
    """Drop the starter thread in a child after a fork: threads do not survive one."""
    global _starter, _starter_lock
    _starter, _starter_lock = None, threading.Lock()
