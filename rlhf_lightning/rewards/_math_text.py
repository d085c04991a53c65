r"""Finding the answer in a completion and writing it in plain LaTeX. Linear in the text's length.

Nothing here evaluates anything: strings in, strings out.
"""

from __future__ import annotations

import re
import unicodedata

TAIL_CHARS = 8192
"""How much of the end of a completion is searched for an answer outside of a box."""

_BRACES = re.compile(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_ANSWER_IS = re.compile(r"(?i)\banswer(?:\s+is\s*:?|\s*[:=])[ \t]*")
_DOLLARS = re.compile(r"\$([^$\n]{1,400})\$(?![0-9])|\\\(([^\n]{1,400}?)\\\)|\\\[(.{1,400}?)\\\]")
_LAST_NUMBER = re.compile(r"[-+]?[$€£]?[0-9][0-9.,/]*%?(?=[\s.!*]*\Z)")
_AMOUNT = re.compile(r"[-+]?\\?[$€£]\s?[0-9][0-9,]*(?:\.[0-9]+)?")
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|\Z)|\n")
_NUMBER_AND_WORDS = re.compile(
    r"([-+]?[$€£]?[0-9][0-9,]*(?:\.[0-9]+)?%?)\s+[A-Za-z]{2,}[A-Za-z ,'-]*"
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}\s+[A-Za-z]{2,}")


def last_box(text: str) -> str | None:
    r"""What the last balanced ``\boxed{...}`` or ``\fbox{...}`` holds, or None.

    >>> last_box(r"\boxed{3}. Wait, no: \boxed{\frac{7}{2}}")
    '\\frac{7}{2}'
    """
    found = _find_last_box(text)
    return None if found is None else found[1]


def _find_last_box(text: str) -> tuple[int, str] | None:
    """Position and content of the last balanced box, in one pass over the braces."""
    start = text.find("box")
    if start < 0:
        return None
    opened: list[tuple[int, int] | None] = []  # (start, content start) of a box, None for a brace
    best: tuple[int, int, int] | None = None
    for match in _BRACES.finditer(text, max(start - 2, 0)):
        token = match.group()
        if token == "{":
            opened.append(None)
        elif token == "}":
            box = opened.pop() if opened else None
            if box is not None and (best is None or box[0] > best[0]):
                best = (*box, match.start())
        elif len(token) > 2:
            opened.append((match.start(), match.end()))
    return None if best is None else (best[0], text[best[1] : best[2]])


def answer_part(completion: str) -> str:
    """The completion after its reasoning: what follows the last ``</think>``.

    Reasoning that was opened and not closed leaves nothing.
    """
    _, closed, rest = completion.rpartition("</think>")
    return "" if "<think>" in rest else rest if closed else completion


def extract_answer(completion: str, require_box: bool) -> str | None:
    r"""The answer as the model wrote it, or None where it gave none.

    The last statement of an answer counts: a box, ``#### x`` or "the answer is x". Where there is
    none of these, the last line is asked for, in this order: its last formula between dollars; all
    of it, where it is the whole text and no prose; a number that ends it; its last sum of money.
    With ``require_box`` only a box counts.

    >>> extract_answer("<think>\\boxed{4}</think> The answer is 72.", require_box=False)
    '72'
    """
    text = answer_part(completion)
    box = _find_last_box(text)
    if require_box:
        return None if box is None else box[1]
    offset = max(0, len(text) - TAIL_CHARS)
    tail = text[offset:]
    stated = [] if box is None else [(*box, True)]
    for pattern in (_HASHES, _ANSWER_IS):
        match = max(pattern.finditer(tail), key=re.Match.start, default=None)
        if match is not None:
            claim = match.group(1) if pattern is _HASHES else _claim(tail[match.end() :])
            # "So the answer is correct." takes nothing back from a box before it.
            stated.append((offset + match.start(), claim, re.search("[0-9]", claim) is not None))
    for _, claim, _ in sorted(stated, key=lambda s: (box is None or s[2], s[0]), reverse=True):
        if claim.strip():
            return claim
    return _unstated(tail)


def _claim(text: str) -> str:
    """The expression with which the rest of "the answer is ..." begins."""
    text = text.lstrip("*: \t\n")[:1000]
    formula = _DOLLARS.match(text)
    if formula:
        return next(group for group in formula.groups() if group)
    line = _SENTENCE_END.split(text, maxsplit=1)[0].strip().strip("*").rstrip(".")
    counted = _NUMBER_AND_WORDS.fullmatch(line)
    return counted.group(1) if counted else line


def _unstated(tail: str) -> str | None:
    """An answer that nothing announces, in the last line of the text."""
    line = tail.strip().rsplit("\n", 1)[-1]
    formulas = _DOLLARS.findall(line[-1000:])
    if formulas:
        formula: str = next(group for group in formulas[-1] if group)
        return None if "box" in formula else formula  # a box that was never closed
    if line and not _PROSE.search(line) and "\n" not in tail.strip():
        return line
    number = _LAST_NUMBER.search(line[-500:])
    if number:
        return number.group()
    amounts = _AMOUNT.findall(line)
    return amounts[-1] if amounts else None


def extract_gold(gold: object) -> str:
    r"""The reference answer in a data set's column: a box, what follows ``####``, or all of it.

    >>> extract_gold("She has 30 + 42 = 72 clips.\n#### 72")
    '72'
    """
    if isinstance(gold, bool) or not isinstance(gold, (str, int, float)):
        return ""
    text = str(gold).strip()
    box = last_box(text)
    if box is not None:
        return box
    if "####" in text:
        return text.rsplit("####", 1)[1].strip()
    formula = _DOLLARS.fullmatch(text.replace("$$", "$"))
    return next(group for group in formula.groups() if group) if formula else text


_CHARACTERS = {
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad\u200e\u200f", ""),
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014", "-"),
    "\u00d7": r"\times ",
    "·": r"\cdot ",
    "÷": "/",
    "\u2044": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "\u222a": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "±": r"\pm ",
    "°": r"^\circ ",
    "\u211d": r"\mathbb{R}",
    "€": "",
    "£": "",
}
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9.]+|[A-Za-z]))")
_SIMPLE = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\left\s*\.|\\right\s*\.|\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mathrm|textbf|mathbf|textrm|mbox|textit)(?=\s*\{)", r"\\text"),
        (r"(?<!\\)\\[,!]", ""),
        (r"\{,\}", ","),
        (r"^\\approx(?![A-Za-z])", ""),
        (r"(?<!\\)\\[;: ]|(?<!\\)~|\\q?quad(?![A-Za-z])", " "),
        (r"\\?\$", ""),
        (r"(?<!\\)%", r"\\%"),
        (r"\\(le|ge)q?(?![A-Za-z])\s*", r"\\\1 "),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\\[A-Za-z]+)\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?", r"^\\circ"),
        (r"\s+", " "),
    )
]
_SPACES = re.compile(r"\s+")
_GROUPED = re.compile(r"(?<!\\)\{[0-9]{1,3}(?:,[0-9]{3})+\}")
_CHAIN = re.compile(r"([^<>=,\\]+?)(>|\\ge |\\gt )([^<>=,\\]+?)(>|\\ge |\\gt )([^<>=,\\]+)")
_FLIPPED = {">": "<", r"\ge ": r"\le ", r"\gt ": r"\lt "}


def clean(text: str) -> str:
    r"""The same answer in plain ASCII LaTeX.

    >>> clean("−3½"), clean("x²"), clean(r"\dfrac12\,\%")
    ('-3\\frac{1}{2}', 'x^{2}', '\\frac{1}{2}\\%')
    """
    if text.isascii() and text.isdigit():
        return text
    if not text.isascii():
        text = _to_ascii(_ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text))
    text = _SPACES.sub(" ", text)  # or the patterns with \\s* take quadratic time
    for pattern, replacement in _SIMPLE:
        text = pattern.sub(replacement, text)
    text = _GROUPED.sub(lambda match: match.group().replace(",", ""), text)
    text = text.strip().rstrip(".,;").strip()
    chain = _CHAIN.fullmatch(text)
    if chain:
        a, first, b, second, c = chain.groups()
        text = f"{c.strip()}{_FLIPPED[second]}{b.strip()}{_FLIPPED[first]}{a.strip()}"
    return text


def _to_ascii(text: str) -> str:
    """NFKC, except that superscripts stay powers, fractions stay whole and digits stay foreign."""
    parts: list[str] = []
    for character in text:
        if character.isascii():
            parts.append(character)
            continue
        if character in _CHARACTERS:
            parts.append(_CHARACTERS[character])
            continue
        plain = unicodedata.normalize("NFKC", character)
        kind = unicodedata.decomposition(character).partition(" ")[0]
        if kind == "<fraction>":
            top, _, bottom = plain.partition("\u2044")
            parts.append(rf"\frac{{{top}}}{{{bottom}}}")
        elif kind in ("<super>", "<sub>"):
            sign = "^" if kind == "<super>" else "_"
            plain = plain.replace("\u2212", "-")
            if parts and parts[-1].startswith(sign + "{"):  # ¹² is one power
                parts[-1] = parts[-1][:-1] + plain + "}"
            else:
                parts.append(f"{sign}{{{plain}}}")
        elif unicodedata.category(character) == "Nd":
            parts.append(character)
        else:
            parts.append(plain)
    return "".join(parts)
