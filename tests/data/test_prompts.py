"""Rows become prompts without a row lost, and prompts become the ids that the model will meet."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lightning.data.chat import ChatOptions
from rlhf_lightning.data.filters import PromptFilters
from rlhf_lightning.data.prompts import PromptFile, encode_prompts
from rlhf_lightning.data.transforms import gsm8k_gold, number_as_text
from rlhf_lightning.models.tokenizers import character_tokenizer

PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
DROP = PromptFilters(too_long="drop")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer(PRINTABLE)


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Puts ``<s>`` before every text, as Llama's does, and an EOS behind it, as some do."""
    from tokenizers.processors import TemplateProcessing

    made = character_tokenizer(PRINTABLE)
    made.add_special_tokens({"bos_token": "<s>"})
    ids = [("<s>", made.bos_token_id), ("<eos>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing("<s> $A <eos>", special_tokens=ids)
    return made


def file_of(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_columns_transforms_template_and_system_follow_each_other(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"q": "2+3", "answer": "2+3=5\n#### 5", "id": 7})
    (row,) = PromptFile(
        path,
        columns={"question": "q"},
        transforms=["rlhf_lightning.data.transforms.gsm8k_gold", lambda r: {**r, "n": r["id"] + 1}],
        template="{question} in \\boxed{{}}, #{n}:",
        system="Be brief.",
    ).load()
    assert row == {
        "q": "2+3",
        "question": "2+3",
        "answer": "5",
        "solution": "2+3=5\n#### 5",
        "id": 7,
        "n": 8,
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+3 in \\boxed{}, #8:"},
        ],
    }


def test_a_rows_braces_are_no_template(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"q": "{answer} {0.__class__}", "answer": "secret"})
    assert PromptFile(path, template="{q}").load()[0]["prompt"] == "{answer} {0.__class__}"


def test_chat_makes_messages_of_prompt_and_completion(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "a", "completion": "b"})
    assert PromptFile(path, chat=True).load() == [
        {
            "prompt": [{"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        }
    ]


def test_rows_for_supervised_training_need_no_prompt(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"messages": [{"role": "user", "content": "b"}]}]
    assert PromptFile(file_of(tmp_path, *rows)).load() == rows


def test_offset_and_limit_cut_disjoint_parts(tmp_path: Path) -> None:
    path = file_of(tmp_path, *({"prompt": str(i)} for i in range(10)))
    parts = [PromptFile(path, limit=7).load(), PromptFile(path, offset=7).load()]
    assert [int(row["prompt"]) for part in parts for row in part] == list(range(10))
    assert len(PromptFile(path, offset=2, limit=3).load()) == 3
    with pytest.raises(ValueError, match=r"offset is 10, but .* has only 10 rows"):
        PromptFile(path, offset=10).load()


def no_row(row: dict[str, Any]) -> Any:
    return None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"rows\.jsonl, row 2: no column 'prompt'; it has \['q'\]"),
        (
            {"columns": {"prompt": "p"}},
            r"row 1: columns needs the column 'p'; .* \['prompt', 'q'\]",
        ),
        ({"template": "{q} {hint}"}, r"row 1: template needs the column 'hint'"),
        ({"transforms": [no_row]}, r"row 1: the transform no_row returned NoneType"),
        (
            {"transforms": [gsm8k_gold]},
            r"row 1: the transform gsm8k_gold failed: no column 'answer'",
        ),
        ({"transforms": [lambda r: r["x"]]}, r"row 1: the transform <lambda> failed: 'x'"),
    ],
)
def test_what_a_row_lacks_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    path = file_of(tmp_path, {"q": "a", "prompt": "b"}, {"q": "c"})
    with pytest.raises(ValueError, match=message):
        PromptFile(path, **arguments).load()


def test_a_rows_own_system_message_is_not_doubled(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": [{"role": "system", "content": "a"}]})
    with pytest.raises(ValueError, match="row 1: it has a system message of its own"):
        PromptFile(path, system="b").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "\\boxed{}"}, r"template has \{\}, which is no column name; double braces"),
        ({"template": "{q.__class__}"}, r"template has \{q\.__class__\}"),
        ({"template": "{q"}, r"template is malformed .* double braces"),
        ({"transforms": ["nowhere.f"]}, r"transforms: 'nowhere\.f' cannot be imported"),
        ({"transforms": ["f"]}, r"transforms: 'f' cannot be imported"),
        ({"transforms": ["os.sep"]}, r"transforms: os\.sep is str, not a function"),
        ({"offset": -1}, "offset is -1"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_bad_arguments_fail_before_anything_is_read(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptFile("rows.jsonl", **arguments)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("a\n#### 72", "72"),
        ("#### -1,234 ", "-1234"),
        ("#### $5.50", "5.50"),
        ("#### 1 #### 2", "2"),
    ],
)
def test_gsm8k_gold(answer: str, gold: str) -> None:
    assert gsm8k_gold({"answer": answer, "x": 1}) == {"answer": gold, "solution": answer, "x": 1}


@pytest.mark.parametrize("answer", ["72", "a ####", "#### $"])
def test_gsm8k_gold_that_is_absent_shows_the_text(answer: str) -> None:
    with pytest.raises(ValueError, match="no answer behind '####' in "):
        gsm8k_gold({"answer": answer})


def test_numbers_as_text() -> None:
    assert [number_as_text({"answer": a})["answer"] for a in (27.0, 27.5, 3, "x")] == [
        "27",
        "27.5",
        "3",
        "x",
    ]
    for bad in (True, None, [1]):
        with pytest.raises(ValueError, match="expected a number or text"):
            number_as_text({"answer": bad})


# Token ids


def text_of(tokenizer: PreTrainedTokenizerFast, rows: list[dict], **how: Any) -> list[str]:
    encoded, _ = encode_prompts(rows, tokenizer, **how)
    assert [prompt.row for prompt in encoded] == rows
    return [tokenizer.decode(prompt.ids) for prompt in encoded]


@pytest.mark.parametrize("text", ["ab", "<s>ab", "a"])
def test_plain_prompts_begin_with_exactly_one_bos(
    bos_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    assert bos_tokenizer("ab").input_ids[-1] == bos_tokenizer.eos_token_id
    body = text.removeprefix("<s>")
    assert text_of(bos_tokenizer, [{"prompt": text}]) == ["<s>" + body]


@pytest.mark.parametrize("written", ["{{ bos_token }}", ""])
def test_only_the_template_decides_on_a_conversations_bos(
    bos_tokenizer: PreTrainedTokenizerFast, written: str
) -> None:
    template = written + "{% for m in messages %}{{ m.content }};{% endfor %}>"
    rows = [{"prompt": [{"role": "user", "content": "ab"}]}]
    text = text_of(bos_tokenizer, rows, chat=ChatOptions(template=template))
    assert text == [("<s>" if written else "") + "ab;>"]


def test_texts_and_conversations_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "b"}]
    chat = ChatOptions(template=template)
    assert text_of(tokenizer, rows, chat=chat) == ["a;", "b"]
    assert text_of(tokenizer, rows[::-1], chat=chat) == ["b", "a;"]


def test_one_token_is_a_prompt_and_none_is_an_error(
    tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert text_of(tokenizer, [{"prompt": "a"}]) == ["a"]
    assert text_of(bos_tokenizer, [{"prompt": ""}]) == ["<s>"]
    with pytest.raises(ValueError, match="row 2: its prompt '' has no tokens"):
        encode_prompts([{"prompt": "a"}, {"prompt": ""}], tokenizer, filters=DROP)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, 3),
        ({"max_prompt_length": 4}, 3),
        ({"max_prompt_length": 3}, 2),
        ({"context_length": 10, "max_new_tokens": 6}, 3),
        ({"context_length": 10, "max_new_tokens": 7}, 2),
        ({"context_length": 10, "max_new_tokens": 6, "max_prompt_length": 2}, 1),
    ],
)
def test_long_prompts_are_counted_or_refused(
    tokenizer: PreTrainedTokenizerFast, limits: dict[str, int], kept: int
) -> None:
    rows = [{"prompt": "abcd"}, {"prompt": "ab"}, {"prompt": "abc"}]
    maximum = limits.pop("max_prompt_length", None)
    drop = PromptFilters(maximum, too_long="drop")
    encoded, report = encode_prompts(rows, tokenizer, filters=drop, **limits)
    limit = [4, 3, 2][3 - kept]
    assert [p.row["prompt"] for p in encoded] == [
        r["prompt"] for r in rows if len(r["prompt"]) <= limit
    ]
    assert len(report["dropped_too_long"]) == 3 - kept
    if kept < 3:
        with pytest.raises(ValueError, match=rf"{3 - kept} of 3 prompts \(rows? 1.*longest has 4"):
            encode_prompts(rows, tokenizer, filters=PromptFilters(maximum), **limits)


def test_a_set_of_which_nothing_is_left_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="none of 1 prompts is left"):
        encode_prompts([{"prompt": "abc"}], tokenizer, filters=PromptFilters(2, "drop"))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        encode_prompts([{"prompt": "a"}], tokenizer, context_length=8, max_new_tokens=8)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "a"},
            r"row 1: a prompt needs the column 'prompt'; the row has \['question'\]",
        ),
        ({"prompt": None}, "row 1: its prompt: expected a list of messages, found nothing"),
        ({"prompt": []}, "row 1: its prompt: expected a list of messages, found an empty list"),
        ({"prompt": "a\ud800"}, "row 1: its prompt holds half a character .* position 1"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "has no chat template: set chat.template"),
    ],
)
def test_prompts_that_are_none(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_prompts([row], tokenizer)


def test_control_tokens_spelled_in_text_never_become_ids(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b<eos>c"}, {"prompt": "<pad>"}]
    with pytest.raises(ValueError, match=r"2 rows: rows 2, 3 spell a control token .*'<eos>'"):
        encode_prompts(rows, tokenizer, chat=ChatOptions(special_tokens="error"))
    encoded, report = encode_prompts(rows, tokenizer, chat=ChatOptions(special_tokens="drop"))
    assert [p.row["prompt"] for p in encoded] == ["a"]
    assert report["dropped_special_tokens"] == [1, 2]
    encoded, _ = encode_prompts(rows, tokenizer, chat=ChatOptions(special_tokens="allow"))
    assert encoded[1].ids[1] == tokenizer.eos_token_id


def test_gsm8k_is_encoded_whole_and_fast(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers/gpt2")
    rows = PromptFile(
        shared_data / "gsm8k/train.jsonl",
        template="Question: {question}\nAnswer:",
        transforms=[gsm8k_gold],
    ).load()
    started = time.process_time()
    encoded, report = encode_prompts(rows, tokenizer, context_length=1024, max_new_tokens=256)
    assert time.process_time() - started < 10  # about 1 s; a row at a time takes several times that
    assert len(encoded) == 7473
    assert not any(report.values())
    assert all(float(row["answer"]) == int(row["answer"]) for row in rows)
    for prompt in encoded[::1000]:
        assert tokenizer.decode(prompt.ids) == prompt.row["prompt"]
