"""Text that models and rewards wrote, made safe to print."""

from __future__ import annotations

import unicodedata

# Control, format (bidi overrides, zero width), surrogate, private, line and paragraph separator:
# a terminal acts on some of them, and a reader cannot see the others.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def escaped(text: str, keep: str = "") -> str:
    r"""The text with every character that does not print written as \n, \x1b, \u202e.

    Characters in `keep` stay. Other text, accents and emoji included, is unchanged.
    """
    return "".join(c if c in keep or (c.isascii() and c.isprintable()) else _shown(c) for c in text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _UNSEEN:
        return char
    return char.encode("unicode_escape").decode("ascii")
