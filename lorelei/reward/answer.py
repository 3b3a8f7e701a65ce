"""Lenient matching of an answer: whether a text ends with the gold one, in whatever form."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus directly behind a word or number is an operator or a hyphen.
_NUMBER = re.compile(r"(?<![\d.])(?:(?<!\w)-)?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)", re.A)


def last_number(text: str) -> Decimal | None:
    """The last integer or decimal in a text; commas between thousands are dropped."""
    found = _NUMBER.findall(text)
    return as_number(found[-1]) if found else None


def as_number(text: str) -> Decimal | None:
    """The whole text as an integer or decimal, or None."""
    plain = text.strip().replace(",", "")
    if not re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)", plain, re.A):
        return None
    return Decimal(plain)


def lenient_match(text: str, gold: str) -> bool:
    """Whether the last number equals a numeric gold answer, or the last lines a textual one.

    Text is compared without case, outer punctuation and runs of white space.
    """
    number = as_number(gold)
    if number is not None:
        return last_number(text) == number
    wanted = _normal(gold)
    lines = text.strip().splitlines()
    ending = lines[-max(len(gold.strip().splitlines()), 1) :]
    return wanted in (_normal(text), _normal("\n".join(ending)))


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .,:;!*`\"'")
