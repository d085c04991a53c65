"""Rows that are left out are counted by reason and named, before training starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from tiny import Sums, grpo, quiet_trainer, rollouts, sequences, sft

from rlhf_lightning.data import PromptFilters, PromptSource
from rlhf_lightning.data.filters import find_missing_gold, is_empty
from rlhf_lightning.data.prompts import encode_prompts
from rlhf_lightning.data.sequences import encode_sequences
from rlhf_lightning.models.tokenizers import character_tokenizer
from rlhf_lightning.rewards import MathReward

TOKENIZER = character_tokenizer("0123456789+=")


class Rows(PromptSource):
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def load(self) -> list[dict[str, Any]]:
        return self.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "truncate"}, r"filters\.too_long is 'truncate'"),
        ({"duplicates": "remove"}, r"filters\.duplicates is 'remove'"),
        ({"missing_gold": "keep"}, r"filters\.missing_gold is 'keep'"),
        ({"max_prompt_length": 0}, r"filters\.max_prompt_length is 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptFilters(**options)


def test_prompts_that_occur_twice() -> None:
    rows = [{"prompt": p, "n": n} for n, p in enumerate(["1+1=", "2=", "1+1=", "1+1=", "12="])]
    kept, report = encode_prompts(rows, TOKENIZER)
    assert (len(kept), report["dropped_duplicate"]) == (5, [])
    kept, report = encode_prompts(rows, TOKENIZER, filters=PromptFilters(duplicates="drop"))
    assert [prompt.row["n"] for prompt in kept] == [0, 1, 4]
    assert report["dropped_duplicate"] == [2, 3]
    with pytest.raises(
        ValueError, match=r"2 of 5 prompts \(rows 3, 4\) .* \(row 3 as row 1\).*filters\.duplicates"
    ):
        encode_prompts(rows, TOKENIZER, filters=PromptFilters(duplicates="error"))


def test_rows_that_occur_twice_in_supervised_training() -> None:
    one = {"prompt": "1+1=", "completion": "2"}
    rows = [one, {**one, "completion": "3"}, one, {"text": "1+1=2"}]
    kept, report = encode_sequences(rows, TOKENIZER, duplicates="drop")
    assert len(kept) == 3  # the text has the same tokens, but all of them are trained
    assert report["dropped_duplicate"] == [2]
    with pytest.raises(ValueError, match=r"1 of 4 rows \(row 3\) .* set data\.duplicates to"):
        encode_sequences(rows, TOKENIZER, duplicates="error")


def test_what_is_empty() -> None:
    assert all(map(is_empty, [None, "", " \n", [], {}, float("nan")]))
    assert not any(map(is_empty, ["x", 0, False, [None], 0.0]))


def unread(rows: Any) -> dict[int, str]:
    return {k: "is odd" for k, row in enumerate(rows) if row["answer"] == "?"}


def test_rows_without_a_gold() -> None:
    answers = ["1", None, "?", " ", "2"]
    rows = [{"answer": answer} for answer in answers]
    drop = {"missing_gold": "drop"}
    found = find_missing_gold(rows, PromptFilters(gold="answer", **drop), unread, "prompts")
    assert found == {"dropped_missing_gold": [1, 2, 3]}
    assert find_missing_gold(rows, PromptFilters(**drop), unread, "prompts") == {
        "dropped_missing_gold": [2]
    }
    assert find_missing_gold(rows[:1], PromptFilters(gold="answer"), unread, "prompts") == {}
    with pytest.raises(
        ValueError, match=r"prompts: 3 of 5 rows have no gold .*row 2: its column 'answer' is empty"
    ):
        find_missing_gold(rows, PromptFilters(gold="answer"), unread, "prompts")
    with pytest.raises(ValueError, match="row 3: is odd"):
        find_missing_gold(rows, PromptFilters(), unread, "prompts")
    with pytest.raises(ValueError, match="2 of 2 rows"):
        find_missing_gold(rows[1:3], PromptFilters(gold="answer", **drop), unread, "prompts")
    with pytest.raises(ValueError, match=r"filters\.gold is 'gold', but .* \['answer'\]"):
        find_missing_gold(rows, PromptFilters(gold="gold"), unread, "prompts")


def test_a_run_says_which_rows_it_leaves_out_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*Sums(8).load(), *Sums(2).load()]
    rows[3] = {**rows[3], "answer": "$$"}
    rows[5] = {**rows[5], "answer": None}
    rows += [{"prompt": "1+" * 40, "completion": "", "answer": "1"}]
    seen: set[str] = set()

    class Watch(Callback):
        def on_rollout_end(self, trainer, pl_module, batch, samples, metrics) -> None:
            seen.update(sample["prompt"] for sample in samples)

    filters = PromptFilters(too_long="drop", duplicates="drop", gold="answer", missing_gold="drop")
    data = rollouts(prompts=Rows(rows), rewards=[MathReward(workers=1)], filters=filters)
    quiet_trainer(tmp_path, max_epochs=4, callbacks=[Watch()]).fit(grpo(), data)
    assert seen == {f"0+{n}=" for n in (0, 1, 2, 4, 6, 7)}
    out = capsys.readouterr().out
    assert "train prompts: 2 of 11 dropped: no gold that an answer could equal (rows 4, 6)" in out
    assert "train prompts: 2 of 11 dropped: the same as an earlier one (rows 9, 10)" in out
    assert "train prompts: 1 of 11 dropped: too long (row 11)" in out


def test_a_bad_gold_stops_the_run_before_the_model_is_loaded(tmp_path: Path) -> None:
    rows = [*Sums(3).load(), {"prompt": "1+1=", "completion": "2", "answer": ""}]
    data = rollouts(prompts=Rows(rows), rewards=[MathReward(workers=1)])
    module = grpo()
    with pytest.raises(ValueError, match=r"row 4: its 'answer', '', is empty.*missing_gold"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, data)
    assert module.policy is None


def test_supervised_duplicates_are_dropped_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows([*Sums(20).load(), *Sums(3).load()])
    quiet_trainer(tmp_path, max_epochs=1).fit(sft(), sequences(dataset=rows, duplicates="drop"))
    assert "train rows: 3 of 23 dropped: the same as an earlier one (rows 21, 22, 23)" in (
        capsys.readouterr().out
    )
