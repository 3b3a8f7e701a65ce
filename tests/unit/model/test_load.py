"""What the loader refuses, in one clear line, and the tokenizer of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lorelei.model.config import DecoderConfig, UnsupportedModel
from lorelei.model.load import CheckpointError, load_decoder
from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
from tests.tiny_models import make_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny("llama", tmp_path)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architecture 'GemmaForCausalLM' is not"),
        ({"architectures": [], "model_type": "gpt2"}, "architecture 'gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' of LlamaForCausalLM is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
            "partial_rotary_factor 0.25 is not supported",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_parameters": {"type": "mrope"}}, "rope_type 'mrope' is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weights quantised with fp8 are not"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs 'factor'"),
    ],
)
def test_variants_that_the_decoder_does_not_build_are_refused_by_name(
    fields: dict[str, Any], message: str, folder: Path
) -> None:
    edit_config(folder, **fields)
    for shard in folder.glob("*.safetensors"):  # refused before any weight is read
        shard.unlink()
    assert message in refusal(folder)


def test_a_model_type_stands_in_for_a_missing_architecture(folder: Path) -> None:
    edit_config(folder, architectures=None)
    assert load_decoder(folder).config.architecture == "LlamaForCausalLM"


def test_head_size_defaults_are_those_of_each_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["head_dim"]
    assert DecoderConfig.from_hf(config).head_dim == 16
    assert DecoderConfig.from_hf({**config, "architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


def test_a_truncated_shard_is_one_clear_line(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is not a readable safetensors file" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model-1.safetensors")
    files = {name: f"model-{1 + ('norm' in name)}.safetensors" for name in tensors}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert "lacks model-2.safetensors" in refusal(folder)
    index.write_text("{")
    assert "model.safetensors.index.json is not JSON" in refusal(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert "has no tensor 'model.layers.1.mlp.up_proj.weight'" in refusal(folder)


def test_a_tensor_of_another_shape_than_the_config_is_named(folder: Path) -> None:
    # 4 + 2 * 2 heads of 32 are as many rows as 6 + 2 * 1: a sum alone would not tell
    edit_config(folder, num_attention_heads=6, num_key_value_heads=1)
    message = refusal(folder)
    assert "q_proj.weight' of" in message
    assert "has shape [128, 64], config.json asks for [192, 64]" in message


def test_a_folder_without_config_or_weights_is_told(folder: Path, tmp_path: Path) -> None:
    assert "neither config.json nor a .gguf file" in refusal(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    assert "has no .safetensors or .gguf file" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON" in refusal(folder)


def test_a_broken_gguf_file_is_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    assert "cannot read" in refusal(tmp_path)


def test_weights_are_kept_in_the_asked_dtype(folder: Path) -> None:
    decoder = load_decoder(folder, torch.bfloat16)
    assert decoder.dtype == torch.bfloat16
    assert all(layer.weight.dense().dtype == torch.bfloat16 for layer in decoder.linears())


def save_tokenizer(folder: Path, eos: str | None = "b") -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate("abcdef")}, unk_token="f"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos).save_pretrained(folder)


def test_a_tokenizer_is_read_from_the_model_folder(folder: Path) -> None:
    save_tokenizer(folder)
    assert load_tokenizer(folder).decode([0, 2]).split() == ["a", "c"]


def test_a_folder_without_tokenizer_is_told_for_every_family(tmp_path: Path) -> None:
    folder = make_tiny("qwen3", tmp_path)  # transformers would make up an empty tokenizer
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "expected"),
    [
        (2, 3, "b", (1, 2, 3)),
        ([2, 4], [4, 0], "e", (0, 2, 4)),
        (None, None, None, ()),
        (5, "absent", None, (5,)),
    ],
)
def test_completions_stop_at_every_end_token_that_a_file_names(
    config: Any, generation: Any, eos: str | None, expected: tuple[int, ...], folder: Path
) -> None:
    save_tokenizer(folder, eos)
    edit_config(folder, eos_token_id=config)
    if generation == "absent":
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        path = folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": generation}))
    assert stop_token_ids(folder, load_tokenizer(folder)) == expected


def test_unsupported_models_and_damaged_folders_are_user_errors() -> None:
    assert issubclass(UnsupportedModel, ValueError) and issubclass(CheckpointError, ValueError)
