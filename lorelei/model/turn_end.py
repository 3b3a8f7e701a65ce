"""The token that a model's chat template writes behind an answer. Imports no transformers.

Base models often name another end of text in their files than the one that their chat template
closes turns with; a model that is trained on such turns would talk on behind its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

_MARK = "lorelei4f1c7e"
_NAMING = ("config", "generation_config")  # files that name end tokens
_CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnEnd:
    """A token; `named`: whether the model's files name it as an end token, too."""

    text: str
    id: int
    named: bool

    @property
    def line(self) -> str:
        """What users are told of one that is not named."""
        return (
            f"model: its chat template closes turns with {self.text!r}, which its files do not "
            "name as an end token; it is a stop token, too"
        )


def turn_end(folder: Path) -> TurnEnd | None:
    """The token that the template in a model's folder writes behind an answer.

    None: there is no template, or it writes text, or refuses this little conversation.
    """
    config, backend = _read(folder / "tokenizer_config.json"), _read(folder / "tokenizer.json")
    template = _template(folder, config)
    if not template:
        return None
    tokens = {key: _text(value) for key, value in config.items() if key.endswith("_token")}
    _, mark, behind = _rendered(template, {k: v for k, v in tokens.items() if v}).partition(_MARK)
    added: dict[str, int] = {
        **{_text(t): int(number) for number, t in config.get("added_tokens_decoder", {}).items()},
        **{t["content"]: t["id"] for t in backend.get("added_tokens") or ()},
    }
    behind = behind.lstrip()
    found = max((t for t in added if t and behind.startswith(t)), key=len, default=None)
    if not mark or found is None:
        return None
    ends = [_read(folder / f"{name}.json").get("eos_token_id") for name in _NAMING]
    ends.append(added.get(tokens.get("eos_token", "")))
    listed = [cast(list[object], end) if isinstance(end, list) else [end] for end in ends]
    named = any(added[found] in these for these in listed)
    return TurnEnd(text=found, id=added[found], named=named)


def _read(path: Path) -> dict[str, Any]:
    try:
        held: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # whoever loads the tokenizer says what is wrong
    return cast(dict[str, Any], held) if isinstance(held, dict) else {}


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    held = config.get("chat_template")
    if isinstance(held, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in cast(list[dict[str, Any]], held)}
        held = named.get("default")
    return held if isinstance(held, str) else None


def _text(token: object) -> str:
    """A token as tokenizer_config.json has it: its text, or a mapping with it."""
    if isinstance(token, Mapping):
        token = cast(Mapping[str, object], token).get("content")
    return token if isinstance(token, str) else ""


def _rendered(template: str, variables: Mapping[str, str]) -> str:
    """As transformers renders it, or "" when the template refuses."""
    from datetime import datetime

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    def tojson(value: object, **_: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=now)
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(template).render(
            messages=_CHAT, tools=None, documents=None, add_generation_prompt=False, **variables
        )
    # The border to the template, which is code of the model; loading it says what is wrong.
    except Exception:
        return ""
