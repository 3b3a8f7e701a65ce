"""Which models the pinned servers can adapt, against their own source. Nothing of it is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lorelei.inference.sglang.kind import ARCHITECTURES, WITH_WINDOWS
from lorelei.inference.vllm.kind import WITHOUT_ADAPTERS
from lorelei.venvs.recipe import interpreter
from tests.environments import needs

Classes = dict[str, tuple[str, list[str]]]  # name -> the text of its module, bases


def package(kind: str) -> Path:
    """Where the server's source is."""
    (found,) = interpreter(kind).parent.parent.glob(f"lib/python3*/site-packages/{kind}")
    return found


def classes(*folders: Path) -> Classes:
    found: Classes = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^class (\w+)\(([^)]*)\):", text, re.MULTILINE):
            found[match[1]] = text, re.findall(r"\w+", match[2])
    return found


def family(name: str, known: Classes) -> set[str]:
    """A class and all that it is made of."""
    seen, left = set[str](), [name]
    while left:
        if (name := left.pop()) not in seen:
            seen.add(name)
            left += known[name][1] if name in known else []
    return seen


def hosted() -> set[str]:
    """The classes of transformers that train.kind fsdp may take, by their names."""
    names = {n for n in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if n.endswith("ForCausalLM")}
    kinds = {name: getattr(transformers, name, None) for name in names}
    return {n for n, kind in kinds.items() if getattr(kind, "_supports_attention_backend", False)}


@needs("vllm")
def test_vllms_models_without_adapters_are_those_that_its_source_marks_so() -> None:
    vllm = package("vllm")
    known = classes(vllm / "model_executor/models", vllm / "models")
    registry = ast.parse((vllm / "model_executor/models/registry.py").read_text(encoding="utf-8"))
    wanted = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
    served = {
        str(ast.literal_eval(key)): str(ast.literal_eval(value)[1])
        for node in registry.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if any(isinstance(t, ast.Name) and t.id in wanted for t in node.targets)
        for key, value in zip(node.value.keys, node.value.values, strict=True)
        if key is not None
    }
    without = {n for n, kind in served.items() if "SupportsLoRA" not in family(kind, known)}
    assert without == WITHOUT_ADAPTERS


@needs("sglang")
def test_sglangs_models_and_those_with_windows_are_those_of_its_source() -> None:
    known = classes(package("sglang") / "srt/models")
    pattern = re.compile(r"^EntryClass\s*=\s*(\[[^]]*\]|\w+)", re.MULTILINE)
    texts = {text for text, _ in known.values()}
    listed = [match[1] for text in texts if (match := pattern.search(text))]
    entries = {name for each in listed for name in re.findall(r"\w+", each)}
    here = entries & (hosted() | {"GPT2LMHeadModel"})
    assert here == ARCHITECTURES
    windows = {
        name
        for name in here
        for part in family(name, known) & known.keys()
        if "sliding_window_size=" in known[part][0]
    }
    assert windows == WITH_WINDOWS
