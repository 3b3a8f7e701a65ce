"""The tokenizer of a model folder, and the tokens that end its completions."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorelei.model.load import CheckpointError, read_config

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises CheckpointError when the folder has none, or one that cannot be read."""
    # transformers would make up an empty tokenizer for some architectures
    if not any((folder / name).is_file() for name in _FILES):
        raise CheckpointError(
            f"model: {folder} has no tokenizer (none of {', '.join(_FILES)}); "
            "copy the tokenizer files of the model into it"
        )
    try:
        return AutoTokenizer.from_pretrained(
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


def stop_token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every end-of-sequence token that config.json, generation_config.json or the tokenizer names.

    Instruct models often name the end of a turn in only one of the three.
    """
    generation = folder / "generation_config.json"
    named = [
        read_config(folder).get("eos_token_id"),
        json.loads(generation.read_text()).get("eos_token_id") if generation.is_file() else None,
        tokenizer.eos_token_id,
    ]
    ids = {i for value in named for i in (value if isinstance(value, list) else [value])}
    return tuple(sorted(ids - {None}))
