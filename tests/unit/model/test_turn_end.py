"""The token that a chat template closes turns with, read from a model's files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.model.turn_end import turn_end
from tests.tiny_models import CHATML, make_tokenizer


def folder_of(place: Path, template: str, eos: str, **named: Any) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, eos_token=eos, chat_template=template
    )
    tokenizer.save_pretrained(place)
    for name in ("config", "generation_config"):
        (place / f"{name}.json").write_text(json.dumps({"eos_token_id": named.get(name)}))
    return place


@pytest.mark.parametrize(
    ("template", "eos", "files", "end"),
    [
        (CHATML, "<|endoftext|>", {}, ("<|im_end|>", 2, False)),
        (CHATML, "<|im_end|>", {}, ("<|im_end|>", 2, True)),
        (CHATML, "<|endoftext|>", {"config": 2}, ("<|im_end|>", 2, True)),
        (CHATML, "<|endoftext|>", {"generation_config": [0, 2]}, ("<|im_end|>", 2, True)),
        (CHATML, "<|endoftext|>", {"generation_config": [0]}, ("<|im_end|>", 2, False)),
        ("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", "<|endoftext|>", {},
         ("<|im_end|>", 2, False)),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<|endoftext|>", {},
         ("<|endoftext|>", 0, True)),
        ("{% for m in messages %}{{ m.content }} END {% endfor %}", "<|endoftext|>", {}, None),
        ("{{ raise_exception('no') }}", "<|endoftext|>", {}, None),
        ("{% for m in messages %}", "<|endoftext|>", {}, None),
        ("", "<|endoftext|>", {}, None),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_found(
    tmp_path: Path, template: str, eos: str, files: Any, end: Any
) -> None:
    found = turn_end(folder_of(tmp_path, template, eos, **files))
    assert (found and (found.text, found.id, found.named)) == end
    if found is not None:
        assert repr(found.text) in found.line and "\n" not in found.line


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert turn_end(tmp_path) is None
