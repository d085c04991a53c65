"""One token a character, there and back, also through a saved folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_lightning.models.tokenizers import character_tokenizer, check_covers

ALPHABET = "0123456789+-*= \n\t▁aÄ漢"


def test_ids_follow_the_given_order() -> None:
    tokenizer = character_tokenizer("ba")
    assert tokenizer.get_vocab() == {"<pad>": 0, "<eos>": 1, "<unk>": 2, "b": 3, "a": 4}
    assert tokenizer("abba").input_ids == [4, 3, 3, 4]
    assert tokenizer("").input_ids == []
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.model_max_length == 1024


@settings(max_examples=50, deadline=None)
@given(st.text(ALPHABET))
@example("\n\n  \t\n")
def test_decoding_is_the_exact_inverse(text: str) -> None:
    tokenizer = character_tokenizer(ALPHABET)
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 1, 0], skip_special_tokens=True) == text


@pytest.mark.parametrize("model_type", [None, "llama", "qwen3", "gpt2"])
def test_auto_tokenizer_loads_the_same(tmp_path: Path, model_type: str | None) -> None:
    tokenizer = character_tokenizer(ALPHABET, model_max_length=64)
    tokenizer.save_pretrained(tmp_path)
    if model_type is not None:
        config = {"model_type": model_type, "bos_token_id": None, "eos_token_id": 1}
        (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(ALPHABET).input_ids == tokenizer(ALPHABET).input_ids
    assert loaded.decode(loaded(ALPHABET).input_ids) == ALPHABET
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded.model_max_length == 64


def test_characters_outside_the_alphabet_are_found() -> None:
    tokenizer = character_tokenizer("01+=")
    assert tokenizer("1-1").input_ids[1] == tokenizer.unk_token_id
    check_covers(tokenizer, ["1+1=", ""])
    with pytest.raises(ValueError, match=r"no token for \['-', '2'\] in '2-1='"):
        check_covers(tokenizer, ["1+1=", "2-1="])


def test_alphabets_that_make_no_tokenizer() -> None:
    with pytest.raises(ValueError, match="characters is empty"):
        character_tokenizer("")
    with pytest.raises(ValueError, match=r"characters holds \['a'\] more than once"):
        character_tokenizer("aba")
