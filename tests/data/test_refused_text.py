"""Text that would silently become something else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data import PromptFile
from rlhf_lightning.data.chat import ChatOptions
from rlhf_lightning.data.prompts import encode_prompts
from rlhf_lightning.data.sequences import encode_sequences
from rlhf_lightning.models.tokenizers import character_tokenizer

REFUSE = ChatOptions(special_tokens="error")
TOKENIZER = character_tokenizer("0123456789+=")


@pytest.mark.parametrize("value", [None, [1, 2], {"a": 1}])
def test_a_template_does_not_render_what_is_no_text(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": "1"}) + "\n" + json.dumps({"q": value}) + "\n")
    with pytest.raises(ValueError, match="row 2: template needs text in the column 'q'"):
        PromptFile(path, template="Q: {q}").load()


def test_characters_without_a_token_are_named() -> None:
    with pytest.raises(ValueError, match=r"no token for \['h'\] in '1h'"):
        encode_prompts([{"prompt": "1+1="}, {"prompt": "1h"}], TOKENIZER)
    with pytest.raises(ValueError, match=r"no token for \['x'\]"):
        encode_sequences([{"prompt": "1=", "completion": "x"}], TOKENIZER)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=<eos>", "completion": "2"},
        {"prompt": "1+1=", "completion": "<eos>2"},
        {"prompt": "<eos>1+1=", "completion": "2"},
        {"text": "1<eos>2"},
    ],
)
def test_a_control_token_out_of_its_place_is_refused(row: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="spell a control token"):
        encode_sequences([row], TOKENIZER, chat=REFUSE)


def test_a_prompt_that_ends_its_own_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="spell a control token"):
        encode_prompts([{"prompt": "1+1=<eos>"}], TOKENIZER, chat=REFUSE)


def test_an_eos_in_its_place_is_the_one() -> None:
    spelled, plain = (
        encode_sequences([{"prompt": "1+1=", "completion": completion}], TOKENIZER)[0][0]
        for completion in ("2<eos>", "2")
    )
    assert spelled == plain
    assert spelled.input_ids.count(TOKENIZER.eos_token_id) == 1
