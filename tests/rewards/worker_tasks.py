"""Tasks for the workers of test_worker_pool.py: good ones and bad ones."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

_factor = 2


def set_factor(factor: int) -> None:
    global _factor
    _factor = factor


def fail_to_start() -> None:
    raise RuntimeError("no licence file")


def die_at_start() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def scale(number: int) -> int:
    return _factor * number


def slow_scale(number: int) -> int:
    time.sleep(0.002)
    return _factor * number


def echo(value: Any) -> Any:
    return value


def late_echo(item: list[Any]) -> Any:
    seconds, value = item
    time.sleep(seconds)
    return value


def environment(name: str) -> str | None:
    return os.environ.get(name)


def modules(_: Any) -> list[str]:
    import sys

    return sorted(sys.modules)


def misbehave(item: list[Any]) -> Any:
    """``[kind, argument]``: what is asked for."""
    kind, argument = item
    if kind == "sleep":
        time.sleep(argument)
    elif kind == "compute":  # C code that holds the interpreter, which no signal handler ends
        return 10 ** (10**9) % 7
    elif kind == "memory":
        return len(bytearray(argument))
    elif kind == "abort":
        os.abort()
    elif kind == "raise":
        raise ValueError(argument)
    elif kind == "exit":
        raise SystemExit(3)
    elif kind == "unserialisable":
        return object()
    elif kind == "die once":
        marker = Path(argument)
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "print":
        print("noise " * 100_000)
    return "fine"


def abort(_: Any) -> None:
    os.abort()
