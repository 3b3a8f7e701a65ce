"""Adapter folders: peft is the oracle in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorelei.lora.peft_folder import CONFIG, TENSORS, read_peft_folder, write_peft_folder
from lorelei.lora.state import AdapterState, tensor_names
from lorelei.store.durable import StoreError
from lorelei.types import AdapterSpec


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def state(model: LlamaForCausalLM, modules: list[str], **spec: Any) -> AdapterState:
    rng = torch.Generator().manual_seed(1)
    tensors = {}
    for module in modules:
        out, into = model.get_submodule(module).weight.shape
        a, b = tensor_names(module)
        tensors |= {a: torch.randn(4, into, generator=rng), b: torch.randn(out, 4, generator=rng)}
    names = tuple(sorted(modules))
    return AdapterState(
        spec=AdapterSpec(rank=4, alpha=6.0, target_modules=names, **spec),
        tensors=dict(sorted(tensors.items())),
    )


def linears(model: LlamaForCausalLM) -> list[str]:
    return [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]


@pytest.mark.parametrize("some", ["all", "one layer", "mixed"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_folder_and_computes_with_our_weights(
    tmp_path: Path, some: str, rslora: bool
) -> None:
    model = llama()
    modules = linears(model)  # 21: peft rewrites lists of 20 and more
    if some == "one layer":
        modules = [m for m in modules if ".1." in m]
    elif some == "mixed":
        modules = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    adapter = state(model, modules, rslora=rslora)
    model.config.save_pretrained(str(tmp_path / "base"))
    write_peft_folder(tmp_path / "a", adapter, str(tmp_path / "base"))
    ids = torch.arange(8)[None]
    base = model(ids).logits
    wrapped = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    theirs = peft.get_peft_model_state_dict(wrapped)
    assert theirs.keys() == adapter.tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in adapter.tensors.items())
    got = wrapped(ids).logits
    # the definition: W + scale * B @ A
    merged = llama()
    for module in modules:
        a, b = (adapter.tensors[name] for name in tensor_names(module))
        merged.get_submodule(module).weight.data += adapter.spec.scale * (b @ a)
    want = merged(ids).logits
    # fp32: one rounding of W + BA against two products
    assert torch.linalg.norm(got - want) < 1e-4 * torch.linalg.norm(want)
    assert torch.linalg.norm(got - base) > 1e-2 * torch.linalg.norm(base)


@pytest.mark.parametrize("rslora", [False, True])
def test_folder_written_by_peft_is_read_with_its_scale(tmp_path: Path, rslora: bool) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj", "up_proj"],
        use_rslora=rslora,
        lora_dropout=0.05,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(llama(), config)
    wrapped.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    got = read_peft_folder(tmp_path / "theirs")
    theirs = peft.get_peft_model_state_dict(wrapped)
    assert got.tensors.keys() == theirs.keys()
    assert all(torch.equal(got.tensors[name], theirs[name]) for name in theirs)
    layer = wrapped.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert got.spec.scale == pytest.approx(layer.scaling["default"], rel=1e-12)
    assert got.spec.dropout == 0.05
    assert got.spec.target_modules == tuple(
        f"model.layers.{i}.{m}" for i in range(3) for m in ("mlp.up_proj", "self_attn.q_proj")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    a, b = tensor_names("model.layers.0.mlp.experts.3.gate_proj")
    want = AdapterState(
        spec=AdapterSpec(
            rank=4,
            alpha=0.3,
            target_modules=("model.layers.0.mlp.experts.3.gate_proj",),
            dropout=0.2,
        ),
        tensors={a: torch.randn(4, 6).to(dtype), b: torch.randn(5, 4).to(dtype)},
    )
    write_peft_folder(tmp_path / "a", want, "org/moe")
    got = read_peft_folder(tmp_path / "a")
    assert got.spec == want.spec and got.digest() == want.digest()
    names = safetensors.torch.load_file(tmp_path / "a" / TENSORS).keys()
    assert "base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight" in names


def test_existing_folder_is_not_written_over(tmp_path: Path) -> None:
    adapter = state(llama(), ["model.layers.0.mlp.up_proj"])
    write_peft_folder(tmp_path / "a", adapter, "org/tiny")
    with pytest.raises(StoreError, match="a: exists already"):
        write_peft_folder(tmp_path / "a", adapter, "org/tiny")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("bias", "all"),
        ("lora_bias", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("r", "four"),
        ("r", 0),
        ("r", 8),
        ("lora_alpha", None),
    ],
)
def test_folder_that_is_not_plain_lora_is_refused_by_field(
    tmp_path: Path, field: str, value: object
) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(StoreError, match=rf"\b{field}\b") as caught:
        read_peft_folder(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings are not supported"),
        ("base_model.model.model.norm.weight", "norm.weight is not one of a LoRA linear layer"),
        (tensor_names("model.layers.1.mlp.up_proj")[0], "lora_B.weight is missing"),
    ],
)
def test_tensor_we_cannot_place_is_refused(tmp_path: Path, name: str, message: str) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    path = tmp_path / "a" / TENSORS
    tensors = safetensors.torch.load(path.read_bytes()) | {name: torch.ones(4, 16)}
    path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(StoreError, match=message):
        read_peft_folder(tmp_path / "a")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_missing_or_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=file):
        read_peft_folder(tmp_path / "a")
    path.unlink()
    with pytest.raises(StoreError, match=f"{file}: missing"):
        read_peft_folder(tmp_path / "a")
