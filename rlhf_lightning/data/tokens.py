"""Text to token ids: what is added, what continues what, and which text is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.models.tokenizers import check_covers


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with nothing added."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    r"""Token ids of texts that go on from other text, as a model would write them.

    A completion is encoded apart from its prompt: encoded together, the last token of one may merge
    with the first of the other into a token that the model, which is given the prompt's tokens,
    cannot produce. Tokenizers that put a space before every text (SentencePiece's dummy prefix)
    would put one here as well, so those encode the text behind a newline.
    """
    (newline, plain, behind) = encode_texts(tokenizer, ["\n", "a", "\na"])
    if behind == newline + plain:
        return encode_texts(tokenizer, texts)
    n = len(newline)
    anchored = encode_texts(tokenizer, ["\n" + text for text in texts])
    return [
        ids[n:] if ids[:n] == newline else encode_texts(tokenizer, [text])[0]
        for ids, text in zip(anchored, texts, strict=True)
    ]


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer puts before plain text: one id, or none."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and whole[: 1 + len(plain)] == [bos, *plain] else []


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that begin a sequence: with one BOS where the tokenizer wants one.

    A BOS that the text spells out at its beginning is that one. An EOS that the tokenizer would add
    is left out, for a prompt does not end there.
    """
    spelled = tokenizer.bos_token or ""
    added = bos_ids(tokenizer)
    starts = [bool(spelled) and text.startswith(spelled) for text in texts]
    bodies = [
        text.removeprefix(spelled) if start else text
        for text, start in zip(texts, starts, strict=True)
    ]
    return [
        ([tokenizer.bos_token_id] if start else added) + ids
        for ids, start in zip(encode_texts(tokenizer, bodies), starts, strict=True)
    ]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokenizer's control tokens and their ids (added tokens like ``<think>`` are none)."""
    known = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = tokenizer.added_tokens_decoder.items()
    return known | {token.content: i for i, token in added if token.special}


class SpecialTokenFilter:
    """Finds rows whose text the tokenizer would turn into control tokens.

    Args:
        tokenizer: whose control tokens are looked for.
        policy: ``"error"``, ``"drop"`` or ``"allow"``, see
            :class:`~rlhf_lightning.data.chat.ChatOptions`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: str) -> None:
        self.policy = policy
        self._bos = tokenizer.bos_token or ""
        self._eos = tokenizer.eos_token or ""
        longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._found: dict[int, str] = {}

    def refuses(self, place: int, *values: Any) -> bool:
        """Whether the row at this place is out: a control token is spelled somewhere in its values.

        Args:
            place: of the row.
            values: strings, or lists and mappings of them (messages, tools).
        """
        if self.policy == "allow":
            return False
        for value in values:
            for text in _strings(value):
                found = self._pattern.search(text)
                if found:
                    self._found[place] = found.group()
                    return True
        return False

    def refuses_text(
        self, place: int, text: str, *, begins: bool = False, ends: bool = False
    ) -> bool:
        """As :meth:`refuses`, for a text in which one control token may stand in its place.

        Args:
            place: of the row.
            text: what is searched.
            begins: it begins a sequence, so that it may begin with BOS.
            ends: it ends one, so that it may end with EOS.
        """
        text = text.removeprefix(self._bos) if begins else text
        return self.refuses(place, text.removesuffix(self._eos) if ends else text)

    def dropped(self) -> int:
        """How many rows are out.

        Raises:
            ValueError: there are some, and the policy is ``"error"``.
        """
        if self._found and self.policy == "error":
            rows = name_rows(list(self._found))
            raise ValueError(
                f"{len(self._found)} rows ({rows}) spell a control token of the tokenizer"
                f" ({next(iter(self._found.values()))!r}), which would act as one. Clean the text,"
                " set chat.special_tokens to 'drop', or to 'allow' if the rows were rendered"
                " beforehand and are trusted"
            )
        return len(self._found)


def check_alphabet(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
    """Refuse texts with a character that a character tokenizer has no token for.

    Raises:
        ValueError: naming the characters and the first text that has one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.model, WordLevel):
        check_covers(tokenizer, texts)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _strings(list(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def check_text(text: Any, where: str) -> str:
    """Refuse what is not text, or holds half a character, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be text, found {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character (a lone surrogate) at position {error.start}; remove"
            " the row or the character"
        ) from error
    return text


def kind_of(value: Any) -> str:
    """What a value is, for errors: ``"nothing"``, ``"an empty list"``, ``"int"``."""
    if isinstance(value, list | dict | str) and not value:
        return f"an empty {type(value).__name__}"
    return "nothing" if value is None else type(value).__name__


def name_rows(places: Sequence[int]) -> str:
    """``"row 3"`` or ``"rows 3, 5, 9, ..."`` for the places 2, 4, 8, ...; rows count from 1."""
    shown = ", ".join(str(place + 1) for place in places[:5])
    return f"row{'s' * (len(places) > 1)} {shown}{', ...' * (len(places) > 5)}"
