"""Run files of any content: a configuration, or one line that names what is wrong with it.

See tests/fuzz.py for how many are tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lorelei.config.errors import ConfigError
from lorelei.config.run import RunConfig
from lorelei.plan.plan import plan
from lorelei.run_file import dump_config, load_config
from tests.fuzz import fuzz
from tests.tiny_models import make_tiny

BASE: dict[str, Any] = {
    "model": "./model",
    "task": {"kind": "jsonl", "path": "rows.jsonl"},
    "reward": {"kind": "math_verify"},
    "algo": {"kind": "grpo"},
}


def sections(schema: dict[str, Any], prefix: str = "", depth: int = 0) -> list[str]:
    """The dotted names of all keys of a JSON schema, three levels down."""
    found: list[str] = []
    every = RunConfig.model_json_schema()["$defs"]
    parts = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())]
    for part in parts:
        if "$ref" in part:
            part = every[part["$ref"].rpartition("/")[2]]
        for name, below in part.get("properties", {}).items():
            found.append(prefix + name)
            if depth < 3:
                found += sections(below, f"{prefix}{name}.", depth + 1)
    return sorted(set(found))


KEYS = sections(RunConfig.model_json_schema())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["grpo", "rloo", "sft", "jsonl", "hf", "vllm", "sglang", "fsdp", "a.py:F", "~", "."]
    ),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(0, 3)), inner, max_size=3),
    ),
    max_leaves=6,
)
CHANGES = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS).map("adapters.a.{}".format)),
        VALUES,
    ),
    max_size=4,
)


def loads_or_says_why(path: Path, *overrides: str) -> None:
    """And what loads can be written and read again, and planned or refused by the plan."""
    try:
        config = load_config(path, overrides)
        written = path.with_suffix(".written")
        written.write_text(dump_config(config), encoding="utf-8")
        assert load_config(written).experiments() == config.experiments()
        plan(config)
    except (ConfigError, ValueError, OSError) as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1, text
        assert "Traceback" not in text and "object at 0x" not in text


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny_tokenizer.save_pretrained(make_tiny("llama", folder / "model"))
    (folder / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 64)
    return folder


def test_what_the_changes_start_from_is_right(place: Path) -> None:
    path = place / "right.yaml"
    path.write_text(yaml.safe_dump(BASE))
    plan(load_config(path))


@fuzz(600)
@given(changes=CHANGES)
def test_changed_values_load_or_are_refused(place: Path, changes: list[tuple[str, Any]]) -> None:
    data: dict[str, Any] = {key: value for key, value in BASE.items()}
    for dotted, value in changes:
        *above, last = dotted.split(".")
        section = data
        for key in above:
            below = section.get(key)
            section[key] = dict(below) if isinstance(below, dict) else {}
            section = section[key]
        section[last] = value
    path = place / "changed.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    loads_or_says_why(path)


@fuzz(600)
@given(key=st.sampled_from(KEYS), value=st.one_of(st.text(max_size=12), SCALARS.map(str)))
def test_overrides_load_or_are_refused(place: Path, key: str, value: str) -> None:
    path = place / "base.yaml"
    path.write_text(yaml.safe_dump(BASE))
    loads_or_says_why(path, f"{key}={value}")


@fuzz(600)
@given(text=st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_file_is_refused_with_its_name(place: Path, text: str | bytes) -> None:
    path = place / "any.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    loads_or_says_why(path)
