r"""What can be decided about two answers without computer algebra, and what must not reach it.

:func:`decide` settles integers, decimals, fractions, percentages, clock times, numerals in a base
and words, in microseconds and exactly. It also holds the cases in which math-verify 0.9.0 rewards
what is wrong (``3=5`` for 5, ``1011_3`` for ``1011_2``, a product left to be worked out).
Everything else is left to the workers.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from rlhf_lightning.types import Verdict

MAX_ANSWER_CHARS = 400
"""The longest answer that is judged by anything but equality."""

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>[-+]?)\ ?
    (?:(?:(?P<whole>[0-9]+)\ ?)?\\frac\{{\ ?(?P<top>-?[0-9]+)\ ?\}}\{{\ ?(?P<bottom>[0-9]+)\ ?\}}
      |(?:(?P<whole2>[0-9]+)\ )?(?P<top2>[0-9]+)\ ?/\ ?(?P<bottom2>[0-9]+)
      |(?P<mantissa>{_DECIMAL})(?:[eE](?P<e>[-+]?[0-9]{{1,3}}))?
       (?:\ ?(?:\\times|\\cdot|\*)\ ?10\ ?\^\ ?\{{?\ ?(?P<power>[-+]?[0-9]{{1,3}})\ ?\}}?)?
      |10\ ?\^\ ?\{{?\ ?(?P<bare_power>[-+]?[0-9]{{1,3}})\ ?\}}?)
    (?P<percent>\ ?\\%)?""",
    re.VERBOSE,
)
_UNIT = re.compile(r"\ ?(?:\\text\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|\^\\circ)$")
_MULTIPLE = re.compile(r"\\text\s*\{\s*(?:hundred|thousand|million|billion|trillion|dozen|percent)")
_ARITHMETIC = re.compile(r"(?:[0-9.,(){}+\-*/ ]|\\times|\\cdot|\\div|\\frac)+")
_OPERATOR = re.compile(r"[0-9)}]\s*(?:[-+*]|\\times|\\cdot)")
_BASE = re.compile(r"([0-9A-Z]+)_\{?(?:\\text\{)?\s*([0-9]+|[a-z]+)\s*\}?\}?")
_CLOCK = re.compile(r"[0-9]+(?:\s*:\s*[0-9]+)+")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'. -]*")
_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)")
_UNDEFINED = re.compile(
    r"\\frac\s*\{[^{}]*\}\s*\{\s*0+(?:\.0*)?\s*\}|/\s*0+(?![0-9.])|(?i:\bnan\b)"
)
_EXPONENT = r"\s*\^\s*[({]*\s*-?[0-9]+"
_POWERS = re.compile(rf"(?P<base>[0-9.]+|(?<![a-zA-Z\\])e|[)}}])(?P<exponents>(?:{_EXPONENT})+)")
_FACTORIAL = re.compile(
    r"0*[0-9]{5,}\s*!|!\s*!|\([0-9^{}!+*/ -]*(?:[\^!]|[0-9]{5})[0-9^{}!+*/ -]*\)\s*!"
)
_BINOMIAL = re.compile(r"\\[dt]?binom\s*\{?\s*[0-9]*(?:[0-9]{6}|\^)")
_MAX_DIGITS = 1e5  # of a number that may be worked out
_FOREIGN_DIGIT = re.compile(r"[^\W0-9_A-Za-z]", re.UNICODE)


class Number(NamedTuple):
    """A number as written: value, decimal places (None for a fraction), percent sign."""

    value: Fraction
    places: int | None
    percent: bool


def as_number(text: str) -> Number | None:
    r"""Read a number, or None where the text is anything else.

    >>> as_number("1,234")
    Number(value=Fraction(1234, 1), places=0, percent=False)
    >>> as_number(r"3\frac{1}{2}").value, as_number("6.02e23").value == 602 * 10**21
    (Fraction(7, 2), True)
    """
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if not _MULTIPLE.search(text):
        text = _UNIT.sub("", text)
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    part = match.groupdict()
    top, bottom = part["top"] or part["top2"], part["bottom"] or part["bottom2"]
    places: int | None = None
    if top is not None:
        if int(bottom) == 0:
            return None
        value = Fraction(int(top), int(bottom)) + int(part["whole"] or part["whole2"] or 0)
    else:
        digits = (part["mantissa"] or "1").replace(",", "").rstrip(".")
        exponent = int(part["e"] or 0) + int(part["power"] or part["bare_power"] or 0)
        value = Fraction(digits) * Fraction(10) ** exponent
        places = len(digits.partition(".")[2])
    if part["percent"]:
        value /= 100
        places = None if places is None else places + 2
    return Number(-value if part["sign"] == "-" else value, places, bool(part["percent"]))


def same_number(gold: Number, answer: Number) -> bool:
    """Whether two written numbers agree.

    They are equal exactly, or one of them is the other rounded to at least six decimal places
    (0.333333 for 1/3). Where the gold is a percentage, its sign may be left out.
    """
    if gold.value == answer.value:
        return True
    if gold.percent and not answer.percent and gold.value * 100 == answer.value:
        return True
    places = [n.places for n in (gold, answer) if n.places is not None]
    if not places or min(places) < 6:
        return False
    return round(gold.value, min(places)) == round(answer.value, min(places))


def is_undefined(text: str) -> bool:
    """Whether an expression divides by a literal zero or is not a number."""
    return _UNDEFINED.search(text) is not None


def is_explosive(text: str) -> bool:
    r"""Whether evaluating an expression would plainly take forever: towers of powers, factorials.

    Not a proof of the opposite: that is what the workers' limit is for.

    >>> [is_explosive(t) for t in ("9^{9^{9}}", "2^{2^{3}}", "99999999!", "20!", "x^{2}")]
    [True, False, True, False, False]
    """
    return (
        any(_digits(match) > _MAX_DIGITS for match in _POWERS.finditer(text))
        or _FACTORIAL.search(text) is not None
        or _BINOMIAL.search(text) is not None
    )


def _digits(powers: re.Match[str]) -> float:
    """How many digits a tower such as ``9^{9^{9}}`` has, or infinity."""
    base = powers["base"].lstrip("0")
    *below, top = [int(n[:20]) for n in re.findall("[0-9]+", powers["exponents"])]
    exponent = float(top)
    for lower in reversed(below):
        if lower > 1 and exponent * math.log10(lower) > 20:
            return math.inf
        exponent = float(lower) ** exponent
    return 0.0 if base in ("", "1") else exponent * max(1, len(base.partition(".")[0]))


def sides(gold: str, answer: str) -> list[str]:
    """The parts of an answer that must equal the gold, the answer itself last.

    ``x=5`` is ``5`` and ``2+3=5`` is both its sides, where the gold is no equation and the answer
    is a single one.
    """
    if _EQUALS.search(gold) or "," in answer or ";" in answer:
        return [answer]
    parts = [part.strip() for part in _EQUALS.split(answer)]
    return [part for part in parts[:-1] if _ARITHMETIC.fullmatch(part)] + [parts[-1]]


def decide(gold: str, answer: str) -> Verdict | None:
    """Judge an answer against a gold, both cleaned, or return None where a worker must.

    Args:
        gold: the reference answer.
        answer: what the model answered.
    """
    if not gold or is_undefined(gold):
        return Verdict.GOLD_UNPARSEABLE
    if not answer:
        return Verdict.NO_ANSWER
    if gold == answer:
        return Verdict.CORRECT
    if len(answer) > MAX_ANSWER_CHARS:
        return Verdict.TOO_LONG
    if is_undefined(answer) or _FOREIGN_DIGIT.search(answer):
        return Verdict.WRONG
    for decided in (_decide_numbers(gold, answer), _decide_notation(gold, answer)):
        if decided is not None:
            return Verdict.CORRECT if decided else Verdict.WRONG
    return Verdict.TIMEOUT if is_explosive(answer) else None


def _decide_numbers(gold: str, answer: str) -> bool | None:
    number = as_number(gold)
    if number is None:
        return None
    *others, last = sides(gold, answer)
    read = as_number(last)
    if read is None:
        # A sum or product of numbers that is left to be worked out restates the problem.
        restated = _ARITHMETIC.fullmatch(last) and _OPERATOR.search(last)
        return False if restated else None
    if not same_number(number, read):
        return False
    readings = [as_number(side) for side in others]
    if any(reading is not None and not same_number(number, reading) for reading in readings):
        return False
    return None if None in readings else True


def _decide_notation(gold: str, answer: str) -> bool | None:
    """Rules for answers that are not expressions, or whose notation is the point."""
    if _CLOCK.fullmatch(gold) and _CLOCK.fullmatch(answer):
        return [int(p) for p in gold.split(":")] == [int(p) for p in answer.split(":")]
    if _CLOCK.fullmatch(gold) or _CLOCK.fullmatch(answer):
        return False
    in_base = [_BASE.fullmatch(text) for text in (gold, answer)]
    if any(in_base):
        return all(in_base) and _same_numeral(in_base)
    words = _as_words(gold)
    if words is not None:
        if words == _as_words(answer):
            return True
        if _TEXT.fullmatch(gold) or len(words) > 3:
            return False
    if _is_set(gold) != _is_set(answer) and _is_pair(gold) != _is_pair(answer):
        return False
    return None


def _same_numeral(matches: list[re.Match[str] | None]) -> bool:
    gold, answer = (match.groups() if match else () for match in matches)
    return gold == answer


def _as_words(text: str) -> str | None:
    r"""Words in lower case: of ``\text{...}``, of a plain word, of a choice such as ``(B)``."""
    match = _TEXT.fullmatch(text)
    inner = (match.group(1) if match else text).strip(" .()")
    return " ".join(inner.casefold().split()) if _WORDS.fullmatch(inner) else None


def _is_set(text: str) -> bool:
    return text.startswith(r"\{") and text.endswith(r"\}")


def _is_pair(text: str) -> bool:
    return text[:1] in ("(", "[") and text[-1:] in (")", "]")
