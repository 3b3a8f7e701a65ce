"""A mixture's experts in peft's form for transformers 5: peft and our decoder are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lorelei.lora.bank import AdapterBank
from lorelei.lora.fused_experts import fuse_experts
from lorelei.lora.peft_folder import read_peft_folder, write_peft_folder
from lorelei.lora.peft_form import peft_form
from lorelei.lora.state import AdapterState
from lorelei.model.attention import PackedAttention, tree_blocks
from lorelei.model.load import load_decoder
from lorelei.store.durable import StoreError
from lorelei.types import AdapterSpec
from tests.tiny_models import make_tiny

# what peft installed here reads: before 0.19 it took the axes of an expert the other way round
INSTALLED = "fused-0.18" if peft.__version__ < "0.19" else "fused"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # a first dense layer: its gate_proj must not be taken for an expert's
    return make_tiny("qwen3_moe", tmp_path_factory.mktemp("moe"), mlp_only_layers=[0])


def logits(bank: AdapterBank[Any], ids: torch.Tensor) -> torch.Tensor:
    route, attend = bank.route([("a", len(ids))]), PackedAttention(tree_blocks([len(ids)], [-1]))
    return route(bank.decoder.head, bank.decoder(ids, torch.arange(len(ids)), route, attend))


def trained(bank: AdapterBank[Any], *targets: str, **spec: Any) -> AdapterState:
    bank.add("a", AdapterSpec(rank=3, alpha=6.0, target_modules=targets, **spec))
    draw = torch.Generator().manual_seed(5)
    for tensor in bank["a"].tensors().values():
        tensor.data = 0.3 * torch.randn(tensor.shape, generator=draw)
    return bank.state("a")


@pytest.mark.parametrize(
    ("targets", "spec"),
    [
        (("all-linear",), {}),
        (("all-linear",), {"rslora": True, "dropout": 0.1}),
        (("gate_proj", "up_proj"), {}),
        (("down_proj", "q_proj"), {}),
        (("up_proj",), {}),  # half of a fused parameter
        (("linear_fc1", "linear_fc2"), {}),  # gate and up share their A
        (("gate_proj", "down_proj"), {"exclude_modules": (r".*experts\.3\..*",)}),
    ],
)
def test_peft_computes_with_fused_experts_what_the_decoder_computes(
    moe: Path, tmp_path: Path, targets: tuple[str, ...], spec: dict[str, Any]
) -> None:
    bank = AdapterBank(load_decoder(moe))
    state = trained(bank, *targets, **spec)
    fused, _ = peft_form(state, str(moe), INSTALLED)
    write_peft_folder(tmp_path / "a", state, str(moe), fused)
    base = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    ids = torch.arange(3, 19)
    with torch.no_grad():
        plain = base(ids[None]).logits[0]
        model = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).eval()
        theirs = model(ids[None]).logits[0]
        ours = logits(bank, ids)
    # fp32: they round W + BA once, we add two products
    assert torch.linalg.norm(ours - theirs) < 1e-4 * torch.linalg.norm(theirs)
    assert torch.linalg.norm(ours - plain) > 1e-2 * torch.linalg.norm(plain)


@pytest.mark.parametrize("form", ["fused", "fused-0.18"])
@pytest.mark.parametrize("targets", [("all-linear",), ("down_proj", "o_proj"), ("up_proj",)])
def test_fused_experts_are_read_back_bit_by_bit(
    tmp_path: Path, form: str, targets: tuple[str, ...]
) -> None:
    folder = make_tiny("qwen3_moe", tmp_path / "moe")
    state = trained(AdapterBank(load_decoder(folder)), *targets)
    fused, notes = peft_form(state, str(folder), form)
    assert notes == []
    write_peft_folder(tmp_path / "a", state, str(folder), fused)
    back = read_peft_folder(tmp_path / "a")
    assert (back.spec.rank, back.spec.scale) == (3, 2.0)
    for name, tensor in state.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    for name in back.tensors.keys() - state.tensors.keys():  # the other half of a parameter
        assert "gate_proj" in name and ("lora_A" in name or not back.tensors[name].any())


def test_an_adapter_that_peft_trained_on_fused_experts_is_read(moe: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)
    state = read_peft_folder(tmp_path / "theirs")
    bank = AdapterBank(load_decoder(moe))
    bank.add("a", state.spec)
    bank.load("a", state.tensors)
    ids = torch.arange(3, 19)
    with torch.no_grad():
        theirs, ours = model(ids[None]).logits[0], logits(bank, ids)
    assert torch.linalg.norm(ours - theirs) < 1e-4 * torch.linalg.norm(theirs)


@pytest.mark.parametrize(
    ("form", "targets", "expected"),
    [
        ("fused", ("q_proj",), "--experts: fused: the adapter has no LoRA on experts"),
        # a dense layer 0: peft from 0.19 on drops its tensors
        ("fused", ("all-linear",), "layers.0.mlp.down_proj is of a dense layer, which peft fr"),
    ],
)
def test_a_form_that_loses_tensors_is_refused(
    moe: Path, form: str, targets: tuple[str, ...], expected: str
) -> None:
    state = trained(AdapterBank(load_decoder(moe)), *targets)
    with pytest.raises(ValueError) as caught:
        peft_form(state, str(moe), form)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_experts_under_another_name_are_refused(moe: Path) -> None:
    state = trained(AdapterBank(load_decoder(moe)), "down_proj")
    renamed = {n.replace("down_proj", "w2"): t for n, t in state.tensors.items()}
    with pytest.raises(ValueError, match="w2 is not one of 4 experts with gate, up and down"):
        fuse_experts(AdapterState(spec=state.spec, tensors=renamed), 4, "fused-0.18")
    with pytest.raises(ValueError, match="is not one of 2 experts"):
        fuse_experts(state, 2, "fused-0.18")


def test_a_fused_folder_that_does_not_hold_a_tensor_is_refused(moe: Path, tmp_path: Path) -> None:
    state = trained(AdapterBank(load_decoder(moe)), "down_proj")
    fused, _ = peft_form(state, str(moe), "fused-0.18")
    changed = {n: t + 1 for n, t in state.tensors.items()}
    with pytest.raises(StoreError, match=r"would not hold .* as it is trained"):
        write_peft_folder(
            tmp_path / "a", AdapterState(spec=state.spec, tensors=changed), str(moe), fused
        )
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(INSTALLED == "fused", reason="peft from 0.19 on fuses single experts itself")
def test_single_experts_are_lost_in_older_peft_as_the_export_says(
    moe: Path, tmp_path: Path
) -> None:
    state = trained(AdapterBank(load_decoder(moe)), "down_proj", "q_proj")
    write_peft_folder(tmp_path / "a", state, str(moe))
    base = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.float32)
    held = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, tmp_path / "a"))
    assert state.tensors.keys() - held.keys() == {n for n in state.tensors if "experts" in n}


def test_an_export_says_what_older_peft_and_merging_do(moe: Path, tmp_path: Path) -> None:
    state = trained(AdapterBank(load_decoder(moe)), "all-linear")
    form, (note,) = peft_form(state, str(moe), "single")
    assert form is None and "peft before 0.19 silently drops" in note
    tied = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    for folder, notes in ((tied, 1), (make_tiny("llama", tmp_path / "untied"), 0)):
        state = trained(AdapterBank(load_decoder(folder)), "lm_head")
        _, found = peft_form(state, str(folder), "single")
        assert len(found) == notes and all("changes the embedding too" in n for n in found)


def test_merging_a_tied_head_changes_the_embedding_as_the_export_says(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    state = trained(AdapterBank(load_decoder(folder)), "lm_head")
    write_peft_folder(tmp_path / "a", state, str(folder))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = base.get_input_embeddings().weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(base, str(tmp_path / "a")).merge_and_unload()
    assert not torch.equal(merged.get_input_embeddings().weight, before)
