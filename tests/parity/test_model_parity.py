"""The decoder against transformers, which runs every sequence alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.route import PublishedRoute
from lorelei.model.attention import PackedAttention, masked_attention, tree_blocks
from lorelei.model.decoder import Decoder
from tests.decoders import load_decoder
from tests.parity.oracle import TOLERANCE, hf_logits, hf_model, relative, smollm2_folder, tolerance
from tests.tiny_models import make_tiny

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-mha-tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-eps": ("llama", {"rms_norm_eps": 0.1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-mha-tied-biases": (
        "qwen3",
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen3-moe": ("qwen3_moe", {}),
    "qwen3-moe-raw-weights": ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "qwen3-moe-dense-layer": ("qwen3_moe", {"mlp_only_layers": [0], "tie_word_embeddings": True}),
    "qwen3-moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn-every-field": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
    },
}
LENGTHS = (7, 1, 150, 20)


def sequences(vocab: int = 300) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in LENGTHS]


def packed_logits(decoder: Decoder, rows: Sequence[Sequence[int]], masked: bool = False) -> Tensor:
    """[T, V] of all sequences in one row, by our decoder."""
    blocks = tree_blocks([len(row) for row in rows], [-1] * len(rows))
    packed = PackedAttention(blocks)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked_attention(q, k, v, blocks) if masked else packed(layer, q, k, v)

    route = PublishedRoute([])
    tokens = torch.tensor([token for row in rows for token in row]).to(decoder.device)
    positions = torch.cat([torch.arange(len(row)) for row in rows]).to(decoder.device)
    return route(decoder.head, decoder(tokens, positions, route, attend)).cpu()


def assert_parity(folder: Path, oracle: Path, dtype: torch.dtype, masked: bool = False) -> None:
    rows = sequences()
    got = packed_logits(load_decoder(folder, dtype), rows, masked).split(LENGTHS)
    model = hf_model(oracle, dtype)
    for row, logits in zip(rows, got, strict=True):
        assert relative(logits, hf_logits(model, row)) < tolerance(dtype, model.config.model_type)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_give_the_logits_of_transformers_one_by_one(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    family, overrides = VARIANTS[variant]
    folder = make_tiny(family, tmp_path, **overrides)
    assert_parity(folder, folder, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_without_a_fused_kernel_gives_the_same_logits(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = make_tiny("qwen3", tmp_path)
    assert_parity(folder, folder, dtype, masked=True)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_rotary_variant_agrees(family: str, rope: str, tmp_path: Path) -> None:
    parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    folder = make_tiny(family, tmp_path, rope_parameters=parameters)
    assert_parity(folder, folder, torch.float64)
    plain = make_tiny(family, tmp_path / "plain")  # the variant must matter for the test to count
    got = packed_logits(load_decoder(folder), sequences())
    assert relative(got, packed_logits(load_decoder(plain), sequences())) > 1e-3


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.5}},
        {"rope_theta": 500.0, "rope_scaling": {**ROPES["llama3"]}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},  # original length: the config's own
    ],
    ids=["theta", "linear", "llama3", "yarn"],
)
def test_configs_written_before_transformers_5_agree(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = make_tiny("llama", tmp_path)
    edit_config(folder, rope_parameters=None, dtype=None, torch_dtype="float32", **fields)
    assert_parity(folder, folder, torch.float64)


def test_positions_far_beyond_the_first_table_agree(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    decoder, model = load_decoder(folder, torch.float64), hf_model(folder, torch.float64)
    row = torch.arange(9)
    route, attend = PublishedRoute([]), PackedAttention(tree_blocks([9], [-1]))
    for start in (0, 100_000, 3):  # the table grows, and is kept
        here = row.to(decoder.device)
        hidden = decoder(here, here + start, route, attend)
        expected = model(row[None], position_ids=row[None] + start, use_cache=False).logits[0]
        assert relative(route(decoder.head, hidden), expected) < 1e-10


def test_a_head_of_its_own_wins_over_a_tied_config_as_in_transformers(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    edit_config(folder, tie_word_embeddings=True)
    assert_parity(folder, folder, torch.float64)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_sharded_checkpoints_agree(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path / "whole")
    hf_model(folder, torch.float32).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_parity(tmp_path / "shards", folder, torch.float32)


def test_moe_checkpoints_name_every_expert(tmp_path: Path) -> None:
    """The names of published checkpoints, which the loader and the adapters rely on."""
    decoder = load_decoder(make_tiny("qwen3_moe", tmp_path))
    names = [part.name for layer in decoder.linears() for part in layer.parts]
    assert "model.layers.1.mlp.experts.3.down_proj" in names
    assert len(names) == 2 * (4 + 4 * 3) + 1


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_gguf_files_agree_with_the_checkpoint_they_were_written_from(
    family: str, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    # GGUF names no expert width, and transformers no head size of Qwen3: both use Qwen's own
    sizes = {"qwen2": {}, "qwen3": {"head_dim": 128}, "qwen3_moe": {"moe_intermediate_size": 768}}
    folder = make_tiny(
        family, tmp_path / "hf", tie_word_embeddings=family == "qwen3", **sizes[family]
    )
    write_gguf(gguf, family, folder, tmp_path / "model.gguf")
    assert_parity(tmp_path, folder, torch.float32)


def write_gguf(gguf: Any, family: str, folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    arch = {"qwen3_moe": "qwen3moe"}.get(family, family)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_token_list([str(i) for i in range(config["vocab_size"])])
    if family == "qwen3_moe":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    number = {arch_name: number for number, arch_name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for name, tensor in stacked(hf_model(folder, torch.float32).state_dict()).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written, name
        writer.add_tensor(written, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """GGUF keeps the gate and the up projections of all experts apart."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            gate, up = tensor.chunk(2, dim=1)
            found[f"{prefix}gate_proj.weight"], found[f"{prefix}up_proj.weight"] = gate, up
        elif name.endswith("experts.down_proj"):
            found[f"{name}.weight"] = tensor
        else:
            found[name] = tensor
    return found


def test_smollm2_gives_the_logits_of_transformers() -> None:
    folder = smollm2_folder()
    rows = sequences(49152)
    got = packed_logits(load_decoder(folder), rows).split(LENGTHS)
    model = hf_model(folder, torch.float32)
    for row, logits in zip(rows, got, strict=True):
        # 30 layers and outlier channels: rounding grows to about 1e-5
        assert relative(logits, hf_logits(model, row)) < 1e-4
