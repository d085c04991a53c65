"""Is the final answer right: the reward of mathematics with a known result."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lightning.rewards._math_rules import MAX_ANSWER_CHARS, decide, is_explosive, sides
from rlhf_lightning.rewards._math_text import clean, extract_answer, extract_gold
from rlhf_lightning.rewards.text import completion_text
from rlhf_lightning.rewards.workers import Outcome, WorkerPool, WorkerResult
from rlhf_lightning.types import RewardResult, Verdict

_TASK = "rlhf_lightning.rewards._math_task"
_OUTCOMES = {
    Outcome.TIMEOUT: Verdict.TIMEOUT,
    Outcome.OUT_OF_MEMORY: Verdict.OUT_OF_MEMORY,
    Outcome.CRASH: Verdict.CRASH,
    Outcome.ERROR: Verdict.CRASH,
}


class MathReward:
    r"""1 where the completion's final answer equals the gold, else 0.

    Only what follows the last ``</think>`` is read. With ``require_box`` the answer is the last
    balanced ``\boxed{...}`` and nothing else. Without, the last statement of an answer counts: a
    box, ``#### 72`` or "the answer is 72"; a completion without any of these may still answer by a
    formula between dollars, a number or a sum of money that ends it, or by being an expression.

    Numbers, words and clock times are compared in place, exactly. Anything else is compared by
    math-verify in worker processes that are killed at ``timeout``: no completion can hang, crash or
    fill the memory of the trainer, from whichever thread this is called. A numeric answer must be
    worked out (``2+3`` is not ``5``), and digits must be ASCII.

    Verdicts: ``correct``; ``wrong``; ``no_answer`` (none found, or not an expression); ``too_long``
    (more than 400 characters); ``timeout`` (killed, or a tower of powers that would be);
    ``out_of_memory``; all but the first score 0. ``crash`` (a worker died of it twice) and
    ``gold_unparseable`` have no score, and so has a row whose gold is None (``not_applicable``).
    A row's details hold the ``extracted`` answer.

    Args:
        gold: the column with the reference answer. It may be the answer alone, with or without
            dollars, or a solution that gives it in a box or after ``####`` (GSM8K).
        require_box: whether an answer outside of a box counts as none.
        timeout: seconds of wall-clock time for one comparison. Verdicts by the clock are the one
            thing about this reward that a second run may not repeat.
        workers: how many processes; None for the processors of this process, at most 8.
    """

    def __init__(
        self,
        gold: str = "answer",
        require_box: bool = False,
        timeout: float = 2.0,
        workers: int | None = None,
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModuleNotFoundError("MathReward needs math-verify: pip install 'math-verify'")
        self.gold = gold
        self.require_box = require_box
        self.pool = WorkerPool(
            f"{_TASK}:judge", setup=f"{_TASK}:prepare", workers=workers, timeout=timeout
        )

    def __call__(
        self, prompts: Sequence[Any] | None, completions: Sequence[Any], **columns: Any
    ) -> list[RewardResult]:
        """Judge completions.

        Args:
            prompts: not used.
            completions: strings or message lists.
            columns: the data set's columns, one value a completion, the gold among them.

        Raises:
            KeyError: where there is no gold column.
            ValueError: where it is not as long as the completions.
            WorkerPoolError: where the workers cannot start.
        """
        golds = self._golds(columns, len(completions))
        answers = [extract_answer(completion_text(c), self.require_box) for c in completions]
        cleaned = [clean(a) if a is not None and len(a) <= 20_000 else a for a in answers]
        verdicts: list[Verdict] = []
        errors: dict[int, str] = {}
        open_rows: dict[tuple[str, str], list[int]] = {}  # one comparison for equal rows
        for row, (gold, answer) in enumerate(zip(golds, cleaned, strict=True)):
            verdict = Verdict.NOT_APPLICABLE if gold is None else decide(gold, answer or "")
            if verdict is None:
                open_rows.setdefault((str(gold), str(answer)), []).append(row)
            verdicts.append(verdict or Verdict.NOT_APPLICABLE)
        items = [{"gold": gold, "answers": sides(gold, answer)} for gold, answer in open_rows]
        for rows, result in zip(open_rows.values(), self.pool.map(items), strict=True):
            for row in rows:
                verdicts[row] = _verdict(result)
                errors[row] = result.error
        return [
            _as_result(verdict, answer, errors.get(row, ""))
            for row, (verdict, answer) in enumerate(zip(verdicts, answers, strict=True))
        ]

    def unusable_rows(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Rows with a gold that no answer can equal: empty, undefined or not readable.

        Args:
            rows: the data set's rows. One whose gold is None is another reward function's.

        Returns:
            What is wrong, by place of the row.

        Raises:
            ValueError: where a row lacks the column, or it is None in all of them.
        """
        lacking = [place for place, row in enumerate(rows) if self.gold not in row]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of {len(rows)} rows have no column {self.gold!r} (first: row"
                f" {lacking[0] + 1}, which has {sorted(rows[lacking[0]])}). Set MathReward's gold"
                " to the column with the reference answer"
            )
        golds = [row[self.gold] for row in rows]
        if golds and all(gold is None for gold in golds):
            raise ValueError(f"column {self.gold!r} is None in all {len(golds)} rows")
        bad: dict[int, str] = {}
        readable: dict[str, list[int]] = {}
        for place, gold in enumerate(golds):
            if gold is None:
                continue
            text = clean(extract_gold(gold))
            if not text:
                bad[place] = "is empty"
            elif decide(text, "0") in (Verdict.CORRECT, Verdict.WRONG):
                continue
            elif decide(text, "0") is Verdict.GOLD_UNPARSEABLE or len(text) > MAX_ANSWER_CHARS:
                bad[place] = f"is undefined or longer than {MAX_ANSWER_CHARS} characters"
            elif not is_explosive(text):
                readable.setdefault(text, []).append(place)
        items = [{"gold": text, "answers": []} for text in readable]
        for places, result in zip(readable.values(), self.pool.map(items), strict=True):
            if _verdict(result) is not Verdict.CORRECT:
                bad.update(dict.fromkeys(places, result.error or "is not an expression"))
        return {
            place: f"its {self.gold!r}, {str(golds[place])[:60]!r}, {bad[place]}"
            for place in sorted(bad)
        }

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()

    def _golds(self, columns: Mapping[str, Any], count: int) -> list[str | None]:
        if self.gold not in columns:
            known = sorted(k for k in columns if isinstance(columns[k], (list, tuple)))
            raise KeyError(
                f"MathReward's gold column {self.gold!r} is not among the columns {known}"
            )
        golds = columns[self.gold]
        if len(golds) != count:
            raise ValueError(f"{count} completions, but {len(golds)} values in {self.gold!r}")
        return [None if gold is None else clean(extract_gold(gold)) for gold in golds]


def _verdict(result: WorkerResult) -> Verdict:
    if result.outcome is Outcome.DONE:
        return Verdict(result.value)
    return _OUTCOMES[result.outcome]


def _as_result(verdict: Verdict, answer: str | None, error: str) -> RewardResult:
    score = float(verdict is Verdict.CORRECT) if verdict.is_scored else None
    details: dict[str, Any] = {"extracted": "" if answer is None else answer[:200]}
    if error:
        details["error"] = error
    return RewardResult(score, verdict, details)
