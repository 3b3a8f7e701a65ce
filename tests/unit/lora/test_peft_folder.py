"""Adapter folders: peft is the oracle in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorelei.lora.peft_folder import CONFIG, TENSORS, read_peft_folder, write_peft_folder
from lorelei.lora.state import AdapterState, tensor_names
from lorelei.store.durable import StoreError
from lorelei.types import AdapterSpec
from tests.tiny_models import make_tiny


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
    ("field", "value", "expected"),
    [
        ("peft_type", "LOHA", "'LOHA' is no LoRA"),
        ("peft_type", None, "None is no LoRA"),
        ("lora_bias", True, "train with lora_bias=False"),
        ("use_dora", True, "True trains magnitudes too; train with use_dora=False"),
        ("use_qalora", True, "train with use_qalora=False"),
        ("modules_to_save", ["lm_head"], "['lm_head'] are whole trained modules"),
        ("trainable_token_indices", [5], "[5] are trained rows of the embedding"),
        ("trainable_token_indices", {"embed_tokens": [5]}, "are trained rows of the embedding"),
        ("layer_replication", [[0, 2], [1, 3]], "without repeated layers"),
        ("alora_invocation_tokens", [1, 2], "behind these tokens only"),
        ("arrow_config", {"top_k": 2}, "routes between adapters"),
        ("target_parameters", ["mlp.gate.weight"], "is not gate_up_proj or down_proj"),
        ("target_parameters", "mlp.experts.down_proj", "must be a list of names"),
        ("init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "pissa_niter_4", "first values were subtracted"),
        ("init_lora_weights", "olora", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "corda", "path_initial_model_for_weight_conversion"),
        ("init_lora_weights", "loftq", "needs a base that Lorelei does not load"),
        ("init_lora_weights", "new", "'new' is not known"),
        ("r", "four", "'four' must be a finite number"),
        ("r", 0, "0 must be a whole number of 1 or more"),
        ("r", 4.5, "4.5 must be a whole number"),
        ("r", float("inf"), "inf must be a finite number"),
        ("r", 10**400, "must be a finite number"),
        ("r", True, "True must be a finite number"),
        ("r", 8, "must be [8, in]; check r and its patterns"),
        ("lora_alpha", None, "None must be a finite number"),
        ("lora_alpha", float("nan"), "nan must be a finite number"),
        ("lora_alpha", "16", "'16' must be a finite number"),
        ("lora_dropout", 1.5, "1.5 must be at least 0 and below 1"),
        ("use_rslora", "true", "'true' must be true or false"),
        ("rank_pattern", {"q_proj": 2}, "has rank 4 and model.layers.0.self_attn.q_proj 2"),
        ("rank_pattern", {"q_(proj": 2}, "'q_(proj' is not a regular expression"),
        ("rank_pattern", {"q_proj": "2"}, "'2' must be a finite number"),
        ("rank_pattern", ["q_proj"], "must map names to numbers"),
        ("alpha_pattern", {"up_proj": 3}, "has alpha / r 0.75 and "),
    ],
)
def test_folder_that_is_not_plain_lora_is_refused_with_field_value_and_fix(
    tmp_path: Path, field: str, value: object, expected: str
) -> None:
    modules = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"]
    write_peft_folder(tmp_path / "a", state(llama(), modules), "org/tiny")
    path = tmp_path / "a" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(StoreError) as caught:
        read_peft_folder(tmp_path / "a")
    message = str(caught.value)
    assert str(tmp_path / "a") in message and expected in message and "\n" not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]},
        {"layers_to_transform": 1, "layers_pattern": "layers", "target_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
        {"bias": "lora_only"},  # these layers have none
        {"fan_in_fan_out": True},  # linear layers ignore it
        {"rank_pattern": {"q_proj": 2, "k_proj": 2}, "alpha_pattern": {"q_proj": 5, "k_proj": 5}},
        {"rank_pattern": {"v_proj": 2}},  # of no module there
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_means_the_same_here_is_taken(tmp_path: Path, fields: dict[str, Any]) -> None:
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"]}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**(given | fields)))
    draw = torch.Generator().manual_seed(3)
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data = torch.randn(tensor.shape, generator=draw)
    model.save_pretrained(str(tmp_path / "a"), save_embedding_layers=False)
    got = read_peft_folder(tmp_path / "a")
    ids = torch.arange(8)[None]
    merged = llama()
    for module in got.spec.target_modules:
        a, b = (got.tensors[name] for name in tensor_names(module))
        merged.get_submodule(module).weight.data += got.spec.scale * (b @ a)
    theirs = model.eval()(ids).logits
    # fp32: one rounding of W + BA against two products
    assert torch.linalg.norm(merged(ids).logits - theirs) < 1e-4 * torch.linalg.norm(theirs)


LAYER = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", None, "embeddings are not suppo"),
        ("base_model.model.model.norm.weight", None, "norm.weight is not one of a LoRA linear"),
        (tensor_names("model.layers.1.mlp.up_proj")[0], None, "lora_B.weight is missing"),
        (f"{LAYER}.lora_magnitude_vector", None, "is DoRA's"),
        (f"{LAYER}.lora_B.bias", None, "lora_B.bias is not one of a LoRA linear layer"),
        (f"{LAYER}.lora_A.default.weight", None, "has the adapter's name in it"),
        ("base_model.model.lm_head.modules_to_save.weight", None, "is a whole trained module"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", None, "is not one of a LoRA linear layer"),
        (f"{LAYER}.lora_A.weight", torch.full((4, 16), torch.nan), "64 of 64 values are NaN"),
        (
            f"{LAYER}.lora_A.weight",
            torch.full((4, 16), 1e300, dtype=torch.float64),
            "infinite in float32",
        ),
        (f"{LAYER}.lora_A.weight", torch.ones(4, 16).int(), "is torch.int32, must be floating"),
        (f"{LAYER}.lora_A.weight", torch.ones(4, 16, 1, 1), "has shape [4, 16, 1, 1], must be"),
    ],
)
def test_tensor_we_cannot_place_is_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    path = tmp_path / "a" / TENSORS
    added = torch.ones(4, 16) if tensor is None else tensor
    tensors = safetensors.torch.load(path.read_bytes()) | {name: added}
    path.write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(StoreError) as caught:
        read_peft_folder(tmp_path / "a")
    assert message in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_pefts_copy_of_the_heads_weight_must_be_the_bases(tmp_path: Path, tied: bool) -> None:
    base = make_tiny("llama", tmp_path / "base", tie_word_embeddings=tied)
    other = make_tiny("llama", tmp_path / "other", tie_word_embeddings=tied, seed=1)
    larger = make_tiny("llama", tmp_path / "larger", vocab_size=310)
    config = peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(tmp_path / "a"))
    assert any(
        "lm_head.base_layer" in n for n in safetensors.torch.load_file(tmp_path / "a" / TENSORS)
    )
    got = read_peft_folder(tmp_path / "a", base)
    assert "lm_head" in got.spec.target_modules
    assert all(".lora_" in name for name in got.tensors)
    for folder in (other, larger):
        with pytest.raises(
            StoreError, match=r"lm_head.base_layer.weight: is .* not the model's own"
        ):
            read_peft_folder(tmp_path / "a", folder)
    with pytest.raises(StoreError, match="nor a weight of the model"):
        read_peft_folder(tmp_path / "a")


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_an_initialisation_that_changes_the_base_is_taken_once_it_is_converted(
    tmp_path: Path, kind: str
) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=kind)
    model = peft.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = kind
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.data += 0.1
    theirs = model.eval()(torch.arange(8)[None]).logits
    model.save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(StoreError, match="path_initial_model_for_weight_conversion"):
        read_peft_folder(tmp_path / "plain")
    model.save_pretrained(
        str(tmp_path / "converted"),
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    got = read_peft_folder(tmp_path / "converted")
    assert got.spec.rank == 8
    merged = llama()
    for module in got.spec.target_modules:
        a, b = (got.tensors[name] for name in tensor_names(module))
        merged.get_submodule(module).weight.data += got.spec.scale * (b @ a)
    ours = merged(torch.arange(8)[None]).logits
    assert torch.linalg.norm(ours - theirs) < 1e-4 * torch.linalg.norm(theirs)


def test_a_bin_file_is_read(tmp_path: Path) -> None:
    want = state(llama(), ["model.layers.0.mlp.up_proj"])
    write_peft_folder(tmp_path / "a", want, "org/tiny")
    (tmp_path / "a" / TENSORS).unlink()
    torch.save(dict(want.tensors), tmp_path / "a/adapter_model.bin")
    assert read_peft_folder(tmp_path / "a").digest() == want.digest()


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": Trap()}, "not a file of tensors that torch.load reads with weights_only"),
        ([torch.ones(2)], "holds list, not tensors by name"),
        ({"epoch": 3}, "'epoch' is not a tensor with a name"),
        ({3: torch.ones(2)}, "3 is not a tensor with a name"),
        ({}, "no tensors"),
        (b"", "not a file of tensors"),
        (b"junk", "not a file of tensors"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_bad_bin_file_is_refused_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    (tmp_path / "a" / TENSORS).unlink()
    path = tmp_path / "a/adapter_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(StoreError) as caught:
        read_peft_folder(tmp_path / "a")
    said = str(caught.value)
    assert message in said and str(path) in said and "\n" not in said
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\x00", "not JSON"),
        (b"{}", "peft_type: None is no LoRA"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_peft_folder(tmp_path / "a", state(llama(), ["model.layers.0.mlp.up_proj"]), "org/tiny")
    (tmp_path / "a" / CONFIG).write_bytes(content)
    with pytest.raises(StoreError) as caught:
        read_peft_folder(tmp_path / "a")
    assert message in str(caught.value) and CONFIG in str(caught.value)


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
