"""What a model wrote, as people, protocols and rewards read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorelei.types import Ints

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

# how models open and close their thinking
THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
TAGS = tuple(tag for pair in THINKING for tag in pair)
# under which a reward is given parts of a reply; a row's own columns must not have these names
COLUMNS = frozenset({"completion_answer", "completion_thinking", "completion_prefix"})
_OPEN = {opened: closed for opened, closed in THINKING}
_ANY = re.compile("|".join(map(re.escape, TAGS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer. Thinking ends at its closing tag; where that is missing, at the answer's end."""

    text: str  # the whole, for people: without control tokens other than those of thinking
    prefix: str = ""  # what the template had written at the answer's beginning, such as <think>
    protocol: str  # behind the thinking, with control tokens: what tool calls are read from
    thinking: str  # without its tags
    answer: str  # `text` behind the thinking; the whole of it where there is none

    @classmethod
    def of(cls, text: str, raw: str | None = None, prefix: str = "") -> Reply:
        """raw: the text with control tokens, where it differs."""
        thinking, answer = split_thinking(text, prefix)
        protocol = answer if raw is None else split_thinking(raw, prefix)[1]
        return cls(text=text, prefix=prefix, protocol=protocol, thinking=thinking, answer=answer)

    def columns(self) -> dict[str, str]:
        """What a reward is given of it, besides the whole text."""
        return {
            "completion_answer": self.answer,
            "completion_thinking": self.thinking,
            "completion_prefix": self.prefix,
        }


def split_thinking(text: str, prefix: str = "") -> tuple[str, str]:
    """(the thinking, the rest) of an answer that goes on behind `prefix`.

    A closing tag that nothing opened ends thinking that a template has begun.
    """
    closing = _left_open(prefix)
    tags = list(_ANY.finditer(text))
    if closing is None and tags and tags[0][0] in _OPEN.values():
        closing = tags[0][0]
    if closing is None and not tags:
        return "", text
    thoughts: list[str] = []
    said: list[str] = []
    at = 0
    for tag in tags:
        if closing is None and tag[0] in _OPEN:
            said.append(text[at : tag.start()])
            closing, at = _OPEN[tag[0]], tag.end()
        elif tag[0] == closing:
            thoughts.append(text[at : tag.start()])
            closing, at = None, tag.end()
    (said if closing is None else thoughts).append(text[at:])
    return "\n".join(filter(None, map(str.strip, thoughts))), "".join(said).strip()


def _left_open(prefix: str) -> str | None:
    """The tag that closes the thinking which a prefix leaves open."""
    closing = None
    for tag in _ANY.finditer(prefix):
        closing = _OPEN.get(tag[0])
    return closing


def thinking_at(text: str) -> int | None:
    """Where the first tag that opens thinking stands."""
    places = [place for opened in _OPEN if (place := text.find(opened)) >= 0]
    return min(places, default=None)


def decoder_of(tokenizer: Tokenizer) -> Callable[[Ints], str]:
    """Token ids to the text that people and rewards read: without control tokens.

    Tags of thinking stay where they are control tokens: without them, thinking and answer would
    run together.
    """
    added = tokenizer.added_tokens_decoder.items()
    special = {str(token.content): number for number, token in added if token.special}
    kept = {special[tag] for tag in _parts(TAGS, special)}
    if not kept:
        return lambda tokens: str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True))
    dropped = set(special.values()) - kept

    def decode(tokens: Ints) -> str:
        shown = [token for token in tokens.tolist() if token not in dropped]
        return str(tokenizer.decode(shown, skip_special_tokens=False))

    return decode


def _parts(tags: Sequence[str], special: Iterable[str]) -> set[str]:
    """The control tokens that tags are, or are made of."""
    return {name for name in special if name and any(name in tag for tag in tags)}
