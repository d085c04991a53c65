"""The child's side of :class:`rlhf_lightning.rewards.workers.WorkerPool`.

This file is run by its path, with the standard library alone, so that a worker is up in a tenth of
a second and never holds torch. Messages are JSON behind a four-byte length: nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1


def read_exactly(channel: socket.socket, size: int) -> bytes:
    """The next ``size`` bytes; ends the process where the parent has hung up."""
    parts = []
    while size:
        part = channel.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def receive(channel: socket.socket) -> dict[str, Any]:
    """The next message of the parent."""
    (size,) = struct.unpack(">I", read_exactly(channel, 4))
    message: dict[str, Any] = json.loads(read_exactly(channel, size))
    return message


def send(channel: socket.socket, message: dict[str, Any]) -> None:
    """Write one message to the parent."""
    body = json.dumps(message).encode()
    channel.sendall(struct.pack(">I", len(body)) + body)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the one that started it is gone, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def limit(kind: int, amount: int) -> None:
    """Lower the soft limit of one resource, as far as the hard limit lets us choose."""
    _, hard = resource.getrlimit(kind)
    soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (soft, hard))


def limit_cpu(seconds: float) -> None:
    """End this process after that much more processor time, should the parent fail to."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + seconds) + 1)


def load(module: str, path: str, function: str) -> Callable[..., Any]:
    """A function of one file, loaded without the packages above it (which may import torch)."""
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no Python source for {module} at {path}")
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[module] = loaded
        spec.loader.exec_module(loaded)
    found: Callable[..., Any] = getattr(sys.modules[module], function)
    return found


def answer(task: Callable[[Any], Any], message: dict[str, Any]) -> dict[str, Any]:
    """Run the task on one item; whatever it raises is reported."""
    reply: dict[str, Any] = {"ticket": message["ticket"]}
    try:
        value = task(message["item"])
        json.dumps(value)
        reply["value"] = value
    except MemoryError:
        reply["out_of_memory"] = True
    except BaseException as error:
        reply["error"] = f"{type(error).__name__}: {error}"[:2000]
    return reply


def main() -> None:
    """Serve the parent until it hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = socket.socket(fileno=int(sys.argv[2]))
    setup = receive(channel)
    die_with_parent(setup["parent"])
    if sys.platform == "linux":  # other kernels have the constant and refuse or ignore it
        limit(resource.RLIMIT_AS, setup["memory_bytes"])
    limit(resource.RLIMIT_CORE, 0)
    sys.path[:] = setup["sys_path"]
    try:
        task = load(*setup["task"])
        if setup["setup"]:
            load(*setup["setup"])(*setup["setup_args"])
    except BaseException:
        send(channel, {"failed": traceback.format_exc()[-4000:]})
        os._exit(1)
    send(channel, {"ready": True})
    while True:
        message = receive(channel)
        limit_cpu(message["timeout"])
        reply = answer(task, message)
        send(channel, reply)
        if "out_of_memory" in reply:  # what is left of the heap is of no use to the next item
            os._exit(0)


if __name__ == "__main__":
    main()
