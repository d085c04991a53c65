"""One reward function on one batch: called, and repaired row by row where it fails."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lightning.rewards._calls import (
    AbortedError,
    EventLoop,
    Future,
    LateError,
    in_time,
    settle,
)
from rlhf_lightning.rewards._scores import (
    NonFiniteReward,
    RewardError,
    accepted,
    as_result,
    as_results,
    is_async,
)
from rlhf_lightning.rewards.workers import WorkerPoolError
from rlhf_lightning.types import RewardResult, Verdict


@dataclass(frozen=True)
class RewardPolicy:
    """What to do when a reward function, not a completion, is at fault.

    Args:
        on_error: what an exception or a timeout does: ``"raise"`` stops the run with an error that
            names the function and the sample; ``"mask"`` gives the samples that cause it no score
            (verdict ``crash``), keeps all others and counts.
        on_nonfinite: the same for a reward that is NaN, infinite or beyond 1e18.
        timeout: seconds for one call of one function; None for no bound. With one, functions run in
            a thread that is left to itself when it is late, and the samples are then tried one by
            one for as long again. A timeout is ``crash``, not ``timeout``: that verdict is a
            model's doing and scores 0.
        max_masked_fraction: the share of a batch that may be without score by faults of one
            function (``crash``, ``sandbox_error``, ``endpoint_error``) before the run stops.
    """

    on_error: Literal["raise", "mask"] = "raise"
    on_nonfinite: Literal["raise", "mask"] = "raise"
    timeout: float | None = None
    max_masked_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("on_error", "on_nonfinite"):
            if getattr(self, name) not in ("raise", "mask"):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be 'raise' or 'mask'")
        if self.timeout is not None and not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout!r}; it must be positive seconds, or None")
        if not 0 <= self.max_masked_fraction <= 1:
            raise ValueError(f"max_masked_fraction is {self.max_masked_fraction!r}, not in [0, 1]")

    def allowed(self, count: int) -> float:
        """How many samples of ``count`` may be without score by a function's fault.

        Under ``"mask"`` at least one, however small the batch (unless the fraction is 0).
        """
        share = self.max_masked_fraction * count
        return max(1.0, share) if self.on_error == "mask" and share else share


class Journal:
    """What a function logged in one call through ``log_extra`` and ``log_metric``."""

    def __init__(self, name: str, count: int) -> None:
        self.name = name
        self.count = count
        self.extras: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Keep a column of values, one a completion."""
        values = list(values)
        if len(values) != self.count:
            raise RewardError(
                f"reward function {self.name!r}: log_extra({column!r}) got {len(values)} values for"
                f" {self.count} completions"
            )
        self.extras[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number, averaged over the calls of the batch."""
        self.metrics.setdefault(name, []).append(float(value))

    def join(self, row: int, other: Journal) -> None:
        """Take over what was logged for one row alone."""
        for column, (value,) in other.extras.items():
            self.extras.setdefault(column, [None] * self.count)[row] = value
        for name, values in other.metrics.items():
            self.metrics.setdefault(name, []).extend(values)


class Evaluation:
    """One function's part in scoring a batch.

    :meth:`begin` starts it where it is async; :meth:`run` has it end; :meth:`results` are its
    findings, with failures repaired as the policy says.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        rows: dict[str, list[Any]],
        trainer_state: Any,
        policy: RewardPolicy,
        loop: EventLoop,
    ) -> None:
        self.name = name
        self.function = function
        self.rows = rows
        self.count = len(rows["completions"])
        self.trainer_state = trainer_state
        self.policy = policy
        self.loop = loop
        self.journal = Journal(name, self.count)
        self._future: Future | None = None
        self._returned: list[Any] | None = None
        self._failure: Exception | None = None

    @property
    def is_async(self) -> bool:
        """Whether it is under way already."""
        return self._future is not None

    @property
    def is_late(self) -> bool:
        """Whether the call on the batch took too long."""
        return isinstance(self._failure, LateError)

    def begin(self) -> None:
        """Start an async function, so that all of them wait together."""
        if is_async(self.function):
            arguments = self._arguments(self.rows, self.journal)
            self._future = self.loop.start(self.function(**arguments))

    def run(self) -> None:
        """Call the function on the batch, or wait for it."""
        if self._future is None:
            arguments = self._arguments(self.rows, self.journal)
        try:
            if self._future is None:
                returned = self._call(arguments, self.policy.timeout)
            else:
                returned = settle(self._future, self.policy.timeout)
            self._returned = as_results(returned, self.name, self.count)
        except RewardError:
            raise
        except Exception as error:  # whatever a user's function raises, the policy decides
            self._failure = error

    def cancel(self) -> None:
        """Give up on an async function that is still under way."""
        if self._future is not None:
            self._future.cancel()

    def results(self) -> list[RewardResult]:
        """One finding a completion."""
        if isinstance(self._failure, WorkerPoolError):
            raise self._failure  # no row of its own would fare better
        if self._failure is not None:
            self.journal = Journal(self.name, self.count)
            return self._one_by_one(self._failure)
        assert self._returned is not None
        return [self._checked(element, row) for row, element in enumerate(self._returned)]

    def _call(self, arguments: dict[str, Any], timeout: float | None) -> Any:
        try:
            return self._call_plainly(arguments, timeout)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            # sys.exit() of a reward is no reason to end the run; a signal's own kind of it is one
            if isinstance(error, SystemExit) and type(error) is not SystemExit:
                raise
            raise AbortedError(error) from error

    def _call_plainly(self, arguments: dict[str, Any], timeout: float | None) -> Any:
        returned = in_time(lambda: self.function(**arguments), timeout)
        if inspect.isgenerator(returned):  # its code runs when it is read
            return in_time(lambda: list(_at_most(returned, self.count + 1)), timeout)
        if inspect.isawaitable(returned):
            return settle(self.loop.start(returned), timeout)
        return returned

    def _arguments(self, rows: dict[str, list[Any]], journal: Journal) -> dict[str, Any]:
        everything = {
            **rows,
            "trainer_state": self.trainer_state,
            "log_extra": journal.log_extra,
            "log_metric": journal.log_metric,
        }
        return accepted(self.function, self.name, everything)

    def _checked(self, element: Any, row: int) -> RewardResult:
        try:
            return as_result(element, self.name, row)
        except NonFiniteReward as error:
            if self.policy.on_nonfinite == "raise":
                raise
            return _masked(error)

    def _one_by_one(self, failure: Exception) -> list[RewardResult]:
        """Find the samples that a failure comes from, by calling the function on each alone."""
        timeout = self.policy.timeout
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        patience = None if timeout is None else timeout / 4  # a few late samples, not just one
        results: list[RewardResult] = []
        faults = 0
        for row in range(self.count):
            try:
                if time.monotonic() >= deadline:
                    raise LateError("its turn did not come, after others took too long")
                results.append(self._alone(row, patience))
            except RewardError:
                raise
            except Exception as error:  # as in run()
                faults += 1
                if self.policy.on_error == "raise" or faults > self.policy.allowed(self.count):
                    raise self._error(error, row) from error
                results.append(_masked(error))
        if self.policy.on_error == "raise":
            raise self._error(failure, None) from failure
        return results

    def _alone(self, row: int, patience: float | None) -> RewardResult:
        journal = Journal(self.name, 1)
        rows = {column: [values[row]] for column, values in self.rows.items()}
        try:
            returned = self._call(self._arguments(rows, journal), patience)
        except LateError:
            self.loop.abandon()
            raise
        (element,) = as_results(returned, self.name, 1)
        self.journal.join(row, journal)
        return self._checked(element, row)

    def _error(self, error: Exception, row: int | None) -> RewardError:
        where = "on the batch, though on no sample alone"
        if row is not None:
            where = f"on sample {row} (completion {str(self.rows['completions'][row])[:80]!r})"
        if isinstance(error, LateError):
            what = f"was late {where}: {error}"
        else:
            what = f"raised {type(error).__name__} {where}: {error}"
        if self.policy.on_error == "mask":
            return RewardError(
                f"reward function {self.name!r} failed on more samples of a batch than"
                f" max_masked_fraction={self.policy.max_masked_fraction:g} allows. The last {what}"
            )
        return RewardError(
            f"reward function {self.name!r} {what}. Mend it, or set reward_policy.on_error to"
            " 'mask' to leave such samples without a score"
        )


def _at_most(generator: Any, count: int) -> Any:
    for _, element in zip(range(count), generator, strict=False):
        yield element


def _masked(error: Exception) -> RewardResult:
    described = f"{type(error).__name__}: {error}"[:500]
    return RewardResult(None, Verdict.CRASH, {"error": described})
