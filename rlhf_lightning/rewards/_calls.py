"""Calling reward functions: within a time, async ones together, from whichever thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import torch

Future = concurrent.futures.Future[Any]


class LateError(Exception):
    """A call did not end in its time."""


class AbortedError(Exception):
    """A call raised what is meant to end a program, such as ``SystemExit``."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")


class EventLoop:
    """An event loop in a thread of its own, where clients kept by async functions stay valid.

    It may be used from a thread whose own loop is running. A copy or a forked child gets a new one.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = 0

    def start(self, awaitable: Awaitable[Any]) -> Future:
        """Schedule a coroutine."""
        if self._loop is None or self._owner != os.getpid():
            self._loop, self._owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(
                target=_run_loop, args=(self._loop,), name="reward-loop", daemon=True
            ).start()
        return asyncio.run_coroutine_threadsafe(_as_coroutine(awaitable), self._loop)

    def abandon(self) -> None:
        """Stop the loop; the next coroutine gets a new one. One that blocks keeps its thread."""
        if self._loop is not None and self._owner == os.getpid():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_loop": None, "_owner": 0}


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:  # it would end the loop's thread, and its caller wait for ever
        raise AbortedError(error) from error


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then end what is still waiting in it and close it."""
    loop.run_forever()
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:  # of nothing, gather() looks for a loop of this thread, which has none
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()


def in_time(call: Callable[[], Any], timeout: float | None) -> Any:
    """The value of a call.

    With a timeout the call runs in a daemon thread, with this thread's context and gradient mode. A
    thread cannot be stopped: one that is late is left to itself.

    Raises:
        LateError: where it takes longer.
        BaseException: whatever the call raises.
    """
    if timeout is None:
        return call()
    future: Future = concurrent.futures.Future()
    context, gradients = contextvars.copy_context(), torch.is_grad_enabled()

    def work() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                future.set_result(context.run(call))
        except BaseException as error:  # handed to the caller, whatever it is
            future.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return settle(future, timeout)


def settle(future: Future, timeout: float | None) -> Any:
    """The value of a future.

    Raises:
        LateError: where it is not there in time.
        BaseException: whatever the work raised.
    """
    try:
        error = future.exception(timeout)
    except concurrent.futures.TimeoutError:
        future.cancel()
        raise LateError(f"no result after {timeout:g} s") from None
    if error is not None:
        raise error
    return future.result()
