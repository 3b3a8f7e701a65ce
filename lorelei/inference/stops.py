"""When a completion is over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorelei.types import GenerateRequest

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer


class StopStrings:
    """Watches one completion's text, decoding only the tokens since the last whole character."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._reach = max(map(len, strings)) - 1  # what a later token may still complete
        self._tokens: list[int] = []
        self._context, self._read = 0, 0  # tokens [context, read) are decoded and give the seam
        self._tail = ""

    @classmethod
    def of(cls, request: GenerateRequest, tokenizer: Tokenizer | None) -> StopStrings | None:
        """Of a request, which may continue an answer; None: it is ended by no string."""
        if not request.sampling.stop_strings or tokenizer is None:
            return None
        stops = cls(tokenizer, request.sampling.stop_strings)
        for token in request.tokens[len(request.tokens) - request.position :].tolist():
            stops.completes(token)
        return stops

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
