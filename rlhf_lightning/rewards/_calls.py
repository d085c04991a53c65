"""Calling reward functions: within a time, async ones together, whichever thread this is."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import torch


class CallTimeout(Exception):  # noqa: N818 (not an error of the callee's)
    """A call did not end in its time."""


class EventLoop:
    """An event loop in a thread of its own, so that clients kept by async functions stay valid.

    It may be used from a thread whose own loop is running. A copy or a fork gets a new loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner = 0

    def start(self, awaitable: Any) -> Future[Any]:
        """Schedule a coroutine."""
        if self._loop is None or self._owner != os.getpid():
            self._loop, self._owner = asyncio.new_event_loop(), os.getpid()
            threading.Thread(
                target=self._loop.run_forever, name="reward-loop", daemon=True
            ).start()
        return asyncio.run_coroutine_threadsafe(_as_coroutine(awaitable), self._loop)

    def abandon(self) -> None:
        """Stop the loop; a coroutine that blocks it keeps only its own thread."""
        if self._loop is not None and self._owner == os.getpid():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._loop = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_loop": None, "_owner": 0}


async def _as_coroutine(awaitable: Any) -> Any:
    return await awaitable


def in_time(call: Callable[[], Any], timeout: float | None) -> Any:
    """The value of a call.

    With a timeout the call runs in a daemon thread with this thread's context and gradient mode. A
    thread cannot be stopped: one that is late is left to itself.

    Raises:
        CallTimeout: where it takes longer.
        BaseException: whatever the call raises.
    """
    if timeout is None:
        return call()
    future: Future[Any] = Future()
    context, gradients = contextvars.copy_context(), torch.is_grad_enabled()

    def work() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                future.set_result(context.run(call))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return wait(future, timeout)


def wait(future: Future[Any], timeout: float | None) -> Any:
    """The value of a future.

    Raises:
        CallTimeout: where it is not there in time. The future is then cancelled.
        BaseException: whatever the work raised.
    """
    try:
        error = future.exception(timeout)
    except TimeoutError:
        future.cancel()
        raise CallTimeout(f"no result after {timeout:g} s") from None
    if error is not None:
        raise error
    return future.result()


def call_any(
    function: Callable[..., Any], arguments: dict[str, Any], loop: EventLoop, timeout: float | None
) -> Any:
    """The value of a function, sync or async."""
    returned = in_time(lambda: function(**arguments), timeout)
    if inspect.isawaitable(returned):
        return settle(loop.start(returned), loop, timeout)
    return returned


def settle(future: Future[Any], loop: EventLoop, timeout: float | None) -> Any:
    """The value of a coroutine on the loop, which is replaced where the coroutine is late."""
    try:
        return wait(future, timeout)
    except CallTimeout:
        loop.abandon()
        raise


__all__ = ["CallTimeout", "Coroutine", "EventLoop", "call_any", "in_time", "settle", "wait"]
