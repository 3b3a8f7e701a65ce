"""Control tokens that stand in data are tokenised as the text that they are.

A row, a tool's result or a user must not open a turn of its own. So whatever a chat template is
given is guarded first: a secret is put into every control token that it holds. In what the template
wrote, control tokens without the secret are the template's own. Text without control tokens is
tokenised as ever.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer

# nobody can write these into data
GUARD = f"guard{secrets.token_hex(8)}"
_NAME = f"control{secrets.token_hex(8)}"


class Composed(str):
    """A text of the configuration with data filled in; its own control tokens are meant."""

    guarded: str


class ControlTokens:
    """Those of one tokenizer: the tokens that it marks as special."""

    def __init__(self, tokenizer: Tokenizer, *, as_text: bool = True) -> None:
        """as_text: False leaves data as it is, so that its control tokens control."""
        added = tokenizer.added_tokens_decoder
        self._tokenizer = tokenizer
        self._ids = {str(t.content): number for number, t in added.items() if t.special}
        self.names = frozenset(name for name in self._ids if name)
        self._any = _one_of(self.names) if as_text and self.names else None
        self._copy: Any = None  # of the tokenizer, with control tokens that only we can write

    def guard(self, value: Any, spared: Sequence[str] = ()) -> Any:
        """Data, text or anything with text in it, for a template. spared: names left as they are.

        Idempotent.
        """
        if self._any is None:
            return value
        if isinstance(value, str):
            if isinstance(value, Composed):
                return value.guarded
            return self._any.sub(lambda found: _broken(found[0], spared), value)
        if isinstance(value, Mapping):
            held = cast(Mapping[Any, Any], value)
            return {self.guard(k, spared): self.guard(v, spared) for k, v in held.items()}
        if isinstance(value, list | tuple):
            return [self.guard(one, spared) for one in cast(Sequence[Any], value)]
        return value

    def composed(self, literal: str, filled: str, guarded: str) -> str:
        """The text `filled`; `guarded` is how a template reads it.

        literal: the part of the configuration; without control tokens of its own the whole is data.
        """
        if self._any is None or self._any.search(literal) is None:
            return filled
        text = Composed(filled)
        text.guarded = guarded
        return text

    @staticmethod
    def plain(text: str) -> str:
        """What stands there when the guards are taken away."""
        return text.replace(GUARD, "")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a guarded text. Raises ValueError for what the tokenizer cannot write."""
        try:
            if GUARD not in text:
                return self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
            return self._with_text(text, add_special_tokens)
        except ValueError:
            raise
        # The border to the tokenizer, which raises a different exception for each defect.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"model: its tokenizer cannot encode {text[:40]!r}...: {reason}"
            ) from error

    def _with_text(self, text: str, add_special_tokens: bool) -> list[int]:
        if self._copy is None:
            self._copy = self._renamed()
        copy, secret_of, id_of = self._copy
        marked = _one_of(self.names).sub(lambda found: secret_of[found[0]], text)
        ids = copy.encode(self.plain(marked), add_special_tokens=add_special_tokens).ids
        return [id_of.get(number, number) for number in ids]

    def _renamed(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """(the tokenizer with its control tokens under secret names, these, their true ids)."""
        tokenizers: Any = import_module("tokenizers")  # its methods have no types
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "task.control_tokens: the data holds control tokens of the model, which a "
                "tokenizer without tokenizer.json cannot write as text; remove them from the data, "
                "or set it to 'tokens'"
            )
        secret_of = {name: f"<{_NAME}-{n}>" for n, name in enumerate(sorted(self.names))}
        spec = json.loads(backend.to_str())
        for token in spec["added_tokens"]:
            token["content"] = secret_of.get(token["content"], token["content"])
        spec["truncation"] = spec["padding"] = None
        copy: Any = tokenizers.Tokenizer.from_str(json.dumps(spec))
        id_of: dict[int, int] = {
            copy.token_to_id(new): self._ids[old] for old, new in secret_of.items()
        }
        return copy, secret_of, id_of


def _one_of(names: frozenset[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def _broken(name: str, spared: Sequence[str]) -> str:
    return name if name in spared else name[0] + GUARD + name[1:]
