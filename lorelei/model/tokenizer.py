"""The tokenizer of a model folder, and the tokens that end its completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lorelei.model.load import CheckpointError, read_config
from lorelei.model.turn_end import turn_end

Messages = Sequence[Mapping[str, Any]]
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class AddedToken(Protocol):
    """What is used here of tokenizers' AddedToken."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """What is used here of transformers' PreTrainedTokenizerBase, with types."""

    chat_template: str | dict[str, str] | None  # a dict: templates by name
    eos_token: str | None
    eos_token_id: int | None
    name_or_path: str

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """{"input_ids": ...}."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self,
        conversation: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Text without `tokenize`; token ids without `return_dict`. Raises jinja2.TemplateError.

        variables: for the template, besides those that it always has.
        """
        ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises CheckpointError when the folder has none, or one that cannot be read."""
    # transformers would make up an empty tokenizer for some architectures
    if not any((folder / name).is_file() for name in _FILES):
        raise CheckpointError(
            f"model: {folder} has no tokenizer (none of {', '.join(_FILES)}); "
            "copy the tokenizer files of the model into it"
        )
    tokenizers: Any = import_module("transformers").AutoTokenizer  # its methods have no types
    try:
        return tokenizers.from_pretrained(
            folder,
            trust_remote_code=False,
            local_files_only=True,
            clean_up_tokenization_spaces=False,  # it drops spaces that the model wrote
        )
    except (ImportError, KeyError, OSError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"model: the tokenizer in {folder} cannot be read: {reason}"
        ) from error


def stop_token_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every token that ends a turn or a text by the model's files.

    Instruct models often name it in only one of config.json, generation_config.json, the tokenizer
    and the chat template.
    """
    generation = folder / "generation_config.json"
    end = turn_end(folder)
    named: list[int | list[int] | None] = [
        read_config(folder).get("eos_token_id"),
        json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None,
        tokenizer.eos_token_id,
        end.id if end else None,
    ]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return tuple(sorted(i for i in ids if i is not None))
