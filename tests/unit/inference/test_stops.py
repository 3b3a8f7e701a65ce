"""Stop strings found while tokens arrive."""

from __future__ import annotations

from typing import Any

import pytest

from lorelei.inference.stops import StopStrings


def tokens_until_stop(tokenizer: Any, text: str, strings: tuple[str, ...]) -> int | None:
    stops = StopStrings(tokenizer, strings)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return next((n for n, t in enumerate(tokens, 1) if stops.completes(t)), None)


@pytest.mark.parametrize(
    ("text", "string"),
    [
        ("one two</answer> three", "</answer>"),
        ("a 漢字 b 漢字.", "字."),  # bytes of one character in several tokens
        ("the end\n\nQ", "\n\n"),
        ("so: 😀!", "😀"),
        ("xxxxab", "xab"),
    ],
)
def test_the_stop_is_the_first_token_at_which_the_text_contains_the_string(
    tiny_tokenizer: Any, text: str, string: str
) -> None:
    tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
    expected = next(
        n for n in range(1, len(tokens) + 1) if string in tiny_tokenizer.decode(tokens[:n])
    )
    assert tokens_until_stop(tiny_tokenizer, text, ("never there", string)) == expected


def test_text_without_the_string_does_not_stop(tiny_tokenizer: Any) -> None:
    assert tokens_until_stop(tiny_tokenizer, "stop it here", ("stop here",)) is None
