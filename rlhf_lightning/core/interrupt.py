"""Where the main thread may be interrupted at once, and what it is then told.

Lightning only notes a signal and reads the note after the training step, which may be ten minutes
away where a step begins with a rollout. Generating and scoring completions changes nothing that a
checkpoint holds, so it can be abandoned at any moment: that code runs in :func:`interruptible`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.exceptions import SIGTERMException


class Stopped(SIGTERMException):
    """The run has been told by a signal to stop, and can be resumed.

    A ``SystemExit``, so that no ``except Exception`` on the way holds it up; its exit status is the
    shell's for that signal (143 for SIGTERM, 130 for Ctrl-C).
    """

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class PeerLost(SIGTERMException):
    """Another process of this run is gone or hangs, so this one cannot go on.

    Python prints the message of an uncaught ``SystemExit``, without a traceback, and exits with 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"error: {message}")
        self.message = message


class Interrupts:
    """What this process's main thread has been told, and whether it may be interrupted now.

    Signals belong to a process, so there is one such object in it (:data:`interrupts`).

    Attributes:
        reason: what the main thread is to raise, None for nothing.
        meet: says whether any process wants to stop, once all have come to the same place with what
            they want themselves; with one process, its own wish.
        wake: has the main thread look, even where it waits for something; None where the signal
            handlers are not installed.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing has been said."""
        self.reason: Stopped | PeerLost | None = None
        self.meet: Callable[[bool], bool] = bool
        self.wake: Callable[[], None] | None = None
        self._open = False

    def tell(self, reason: Stopped | PeerLost) -> None:
        """Have the main thread raise this at its next opportunity. Any thread may call it.

        The first word counts, but a lost peer overrides a wish to stop in good order.
        """
        if self.reason is None or (
            isinstance(reason, PeerLost) and not isinstance(self.reason, PeerLost)
        ):
            self.reason = reason

    def check(self) -> None:
        """Raise what has been said."""
        if self.reason is not None:
            raise self.reason

    def strike(self) -> None:
        """Raise it in an open section, once (the main thread's signal handler calls this)."""
        if self._open and self.reason is not None:
            self._open = False
            raise self.reason

    @contextmanager
    def section(self) -> Iterator[None]:
        """See :func:`interruptible`."""
        try:
            self._open = True
            self.check()
            yield
        except Stopped:
            pass  # raised again below, once the others know
        finally:
            self._open = False
        if isinstance(self.reason, PeerLost):
            raise self.reason
        if self.meet(self.reason is not None):
            self.tell(Stopped())
            self.check()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """See :func:`uninterrupted`."""
        was_open, self._open = self._open, False
        try:
            yield
        finally:
            self._open = was_open
        if was_open:
            self.check()


interrupts = Interrupts()
"""This process's."""


@contextmanager
def interruptible() -> Iterator[None]:
    """In here SIGTERM, Ctrl-C or the loss of a peer raises at once.

    The code must change nothing that a checkpoint holds, and call no collective outside
    :func:`uninterrupted`, for processes are interrupted in different places. All processes leave
    together: if one was told to stop, all raise :class:`Stopped`.
    """
    with interrupts.section():
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """A part of an interruptible section in which processes must stay in step."""
    with interrupts.closed():
        yield
