"""Screens: where lines of text go, a terminal with a live table or a plain stream.

Text that models and rewards wrote is escaped, so that it cannot act on a terminal.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

# Control, format (bidi overrides, zero width), surrogate, private, line and paragraph separator:
# a terminal acts on some of them, and a reader cannot see the others.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def open_screen(stream: TextIO) -> PlainScreen | TerminalScreen:
    """A live screen on a terminal that can draw one, plain lines anywhere else."""
    rich = RichConsole(file=stream, highlight=False)
    unicode = (getattr(stream, "encoding", None) or "").lower().startswith("utf")
    if stream.isatty() and unicode and not rich.is_dumb_terminal:
        return TerminalScreen(rich)
    return PlainScreen(stream)


class PlainScreen:
    """One line of printable characters for each event, flushed: for files, pipes and CI."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def line(self, words: Sequence[str], style: str = "") -> None:
        text = escaped("  ".join(words))
        # A log in ASCII must not stop the run: what it cannot hold is written as \uXXXX.
        text = text.encode(self._encoding, "backslashreplace").decode(self._encoding)
        self._stream.write(text + "\n")
        self._stream.flush()

    def show(self, live: RenderableType) -> None: ...

    def close(self) -> None: ...


class TerminalScreen:
    """Lines scroll by above a table that is drawn anew every second."""

    def __init__(self, rich: RichConsole) -> None:
        self._rich = rich
        self._live: Live | None = None

    def line(self, words: Sequence[str], style: str = "") -> None:
        """Print one line that stays."""
        shown = [escaped(word) for word in words]
        self._rich.print(Text("  ".join(shown[: fitting(shown, self._rich.width)]), style=style))

    def show(self, live: RenderableType) -> None:
        """Replace what is shown below the lines."""
        if self._live is None:
            self._live = Live(console=self._rich, refresh_per_second=1)
            self._live.start()
        self._live.update(live, refresh=True)

    def close(self) -> None:
        """Leave the terminal as it was. Idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def fitting(words: Sequence[str], width: int) -> int:
    """How many words, two spaces apart, fit on a line; at least one."""
    used = -2
    for count, word in enumerate(words):
        used += 2 + Text(word).cell_len
        if used > width:
            return max(1, count)
    return len(words)


def escaped(text: str, keep: str = "") -> str:
    r"""The text with every character that does not print written as \n, \x1b, \u202e.

    Characters in `keep` stay. Other text, accents and emoji included, is unchanged.
    """
    return "".join(c if c in keep or (c.isascii() and c.isprintable()) else _shown(c) for c in text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in _UNSEEN:
        return char
    return char.encode("unicode_escape").decode("ascii")
