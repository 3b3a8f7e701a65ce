"""When a completion is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...


class StopStrings:
    """Watches one completion's text, decoding only the tokens since the last whole character."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._reach = max(map(len, strings)) - 1  # what a later token may still complete
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens [context, read) are decoded and give the seam
        self._tail = ""

    def completes(self, token: int) -> bool:
        """Add a token; whether the text now contains a stop string."""
        self._tokens.append(token)
        # tokens decode differently at the start of a text, so they are decoded after a few others
        seam = self._decode(self._context, self._read)
        text = self._decode(self._context, len(self._tokens))
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return False  # in the middle of a character
        seen = self._tail + text[len(seam) :]
        self._context, self._read = self._read, len(self._tokens)
        self._tail = seen[-self._reach :] if self._reach else ""
        return any(string in seen for string in self._strings)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=False)
