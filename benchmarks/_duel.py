"""Two programs that take turns: each in a process of its own, one step at a time.

A process of its own gives each contestant its own peak memory and its own caches; turns let noise
from other programs fall on both alike.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any


class Turn:
    """A contestant's side: waits for its turn, and reports what the turn took.

    Args:
        pipe: to the process that keeps the score.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._started: tuple[float, float] | None = None

    def begin(self) -> None:
        """Wait for the turn; the clock runs from here."""
        self._pipe.recv()
        self._started = (time.perf_counter(), time.process_time())

    def end(self, **parts: float) -> None:
        """The turn is over.

        Args:
            parts: figures of the turn, such as the seconds of a part of it.
        """
        assert self._started is not None
        wall = time.perf_counter() - self._started[0]
        cpu = time.process_time() - self._started[1]
        self._pipe.send({"wall_s": wall, "cpu_s": cpu, "peak_mib": peak_mib(), **parts})
        self._started = None


@dataclass
class Score:
    """What a contestant's turns took.

    Attributes:
        turns: a mapping of figures for each turn that counts.
    """

    turns: list[dict[str, float]] = field(default_factory=list)

    def median(self, name: str) -> float:
        """The median of a figure over the turns."""
        return statistics.median(turn[name] for turn in self.turns)

    def highest(self, name: str) -> float:
        """The largest value of a figure."""
        return max(turn[name] for turn in self.turns)


def peak_mib() -> float:
    """The most memory that this process has held so far, in MiB."""
    with open("/proc/self/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def duel(
    contestants: dict[str, Callable[..., None]],
    arguments: Sequence[Any] = (),
    *,
    turns: int,
    warm_up: int = 1,
    threads: int = 1,
) -> dict[str, Score]:
    """Let contestants take turns.

    Args:
        contestants: functions of a :class:`Turn` and of ``arguments``, importable by name. Each
            takes ``turns + warm_up`` turns and returns.
        arguments: what else they get.
        turns: how many turns count.
        warm_up: how many turns come before those.
        threads: OpenMP threads of each.

    Raises:
        RuntimeError: with a contestant's traceback, if it fails.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)  # inherited, and read when torch is imported
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for name, contestant in contestants.items():
        mine, theirs = context.Pipe()
        process = context.Process(target=_contest, args=(contestant, theirs, *arguments))
        process.start()
        theirs.close()
        pipes[name] = mine
        processes.append(process)
    scores = {name: Score() for name in contestants}
    try:
        for turn in range(-warm_up, turns):
            for name, pipe in pipes.items():
                pipe.send("go")
                result = _receive(name, pipe)
                if turn >= 0:
                    scores[name].turns.append(result)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    return scores


def _receive(name: str, pipe: Connection) -> dict[str, float]:
    try:
        result = pipe.recv()
    except (EOFError, ConnectionResetError):
        result = "it ended before its turn was over"
    if isinstance(result, str):
        raise RuntimeError(f"{name}: {result}")
    return result


def _contest(contestant: Callable[..., None], pipe: Connection, *arguments: Any) -> None:
    try:
        contestant(Turn(pipe), *arguments)
    except BaseException:
        pipe.send(traceback.format_exc())
        raise
