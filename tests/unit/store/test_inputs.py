"""What a run was made with is told from what looks like it, and from nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lorelei.model import fingerprint
from lorelei.model.fingerprint import model_digests
from lorelei.run_file import load_config
from lorelei.store.inputs import differences, missing, read_inputs
from tests.tiny_models import make_tiny

RUN = """
model: ./model
task: {kind: jsonl, path: rows.jsonl}
reward: {kind: python, path: rewards.py:score}
env: {kind: tools, tools: [calculator, "tools.py:look"]}
lora: {init_from: start}
eval: {every: 0}
"""
TOP = "import json\nfrom helpers import base\nimport parts.near\n\ndef score(**row): ...\n"


@pytest.fixture
def place(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_tokenizer.save_pretrained(make_tiny("llama", tmp_path / "model"))
    files = {
        "run.yaml": RUN,
        "rows.jsonl": '{"question": "a"}\n',
        "rewards.py": TOP,
        "helpers.py": "from parts import far\n",
        "parts/near.py": "A = 1\n",
        "parts/far.py": "from . import deep\n",
        "parts/deep.py": "B = 1\n",
        "unused.py": "C = 1\n",
        "tools.py": "def look(): ...\n",
        "start/adapter_config.json": "{}",
        "start/adapter_model.safetensors": "x",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=4))


def one_weight(place: Path) -> None:
    path = place / "model/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def append(name: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        with open(place / name, "a") as file:
            file.write("\n")

    return change


# what is changed: the field that says so
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "one weight": (one_weight, "model"),
    "the rope": (lambda p: edit(p / "model/config.json", rope_theta=7.0), "model"),
    "the tokenizer": (append("model/tokenizer.json"), "model"),
    "the chat template": (append("model/chat_template.jinja"), "model"),
    "the stop tokens": (
        lambda p: edit(p / "model/generation_config.json", eos_token_id=9),
        "model",
    ),
    "a row": (append("rows.jsonl"), "task.path"),
    "the reward": (append("rewards.py"), "reward.path"),
    "what the reward imports": (append("helpers.py"), "reward.path"),
    "a module of what it imports": (append("parts/near.py"), "reward.path"),
    "what that imports by a dot": (append("parts/deep.py"), "reward.path"),
    "a tool": (append("tools.py"), "env.tools"),
    "the adapter to start from": (append("start/adapter_model.safetensors"), "lora.init_from"),
}


def inputs(place: Path):
    config = load_config(place / "run.yaml")
    return read_inputs(config, Path(config.model))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_in_its_field_alone(place: Path, name: str) -> None:
    before = inputs(place)
    change, field = CHANGES[name]
    change(place)
    (found,) = differences(before, inputs(place))
    assert found.field == field
    assert str(found).startswith(f"{field}: is not what the run was made with: ")


def resharded(place: Path) -> None:
    path = place / "model/model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for shard, own in shards.items():
        save_file({n: tensors[n] for n in own}, place / "model" / shard)
    weight_map = {n: shard for shard, own in shards.items() for n in own}
    index = place / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


SAME: dict[str, Callable[[Path], None]] = {
    "weights in other files": resharded,
    "a note of transformers": lambda p: edit(p / "model/config.json", transformers_version="9"),
    "a file that nobody reads": append("model/README.md"),
    "a module that nobody imports": append("unused.py"),
}


@pytest.mark.parametrize("name", SAME)
def test_what_means_the_same_is_the_same(place: Path, name: str) -> None:
    before = inputs(place)
    SAME[name](place)
    assert differences(before, inputs(place)) == []


def test_a_copy_elsewhere_is_the_same(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("copy") / "all"
    shutil.copytree(place, copy)
    assert differences(inputs(place), inputs(copy)) == []


def test_what_is_not_there_is_missing_and_not_different(place: Path) -> None:
    before = inputs(place)
    for name in ("rows.jsonl", "rewards.py"):
        (place / name).unlink()
    shutil.rmtree(place / "start")
    assert differences(before, inputs(place)) == []
    assert missing(before, inputs(place)) == ["task.path", "reward.path"], "nobody reads the start"


def test_large_weights_are_sampled_at_several_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 0)
    tensors = {"w": torch.zeros(1 << 20), "v": torch.zeros(8)}
    digests = set[str]()
    for place in (None, 0, (1 << 20) // 2, (1 << 20) - 1):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        if place is not None:
            changed["w"][max(place - 150_000, 0) : place + 150_000] = 1
        save_file(changed, tmp_path / "model.safetensors")
        digests.add(model_digests(tmp_path)["weights"])
    assert len(digests) == 4


def test_files_that_are_damaged_have_a_digest_too(tmp_path: Path) -> None:
    digests = set[str]()
    for content in (b"", b"\x80\x04" * 99, b"\2\0\0\0\0\0\0\0[]", b"\4\0\0\0\0\0\0\0null"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.add(model_digests(tmp_path)["weights"])
    assert len(digests) == 4
