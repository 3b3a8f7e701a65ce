"""Which form an export has, and what its readers must know."""

from __future__ import annotations

from lorelei.lora.fused_experts import FORMS, Fused, fuse_experts, has_experts
from lorelei.lora.state import AdapterState
from lorelei.lora.targets import HEAD
from lorelei.lora.tensor_file import lora_modules
from lorelei.model.config import DecoderConfig
from lorelei.model.load import read_config
from lorelei.model.locate import resolve_model


def peft_form(state: AdapterState, model: str, experts: str) -> tuple[Fused | None, list[str]]:
    """The fused experts where asked for, and warnings for people.

    experts: 'single' or one of FORMS. Raises ValueError for a form that the adapter does not have.
    """
    modules, notes = lora_modules(state.tensors, state.spec.rank), list[str]()
    if HEAD in modules and _ties(model):
        notes.append(
            f"the adapter has LoRA on lm_head, which is one tensor with the embedding in {model}: "
            "merging (peft's merge_and_unload) changes the embedding too; load the adapter "
            "unmerged, or clone lm_head.weight and set tie_word_embeddings: false before merging"
        )
    if experts in FORMS:
        if not has_experts(modules):
            raise ValueError(
                f"--experts: {experts}: the adapter has no LoRA on experts; leave the option out"
            )
        moe = DecoderConfig.from_hf(read_config(resolve_model(model, weights=False))).moe
        try:
            return fuse_experts(state, moe.experts if moe is not None else 0, experts), notes
        except ValueError as error:
            raise ValueError(
                f"--experts: {experts}: {error}; use --experts single or fused-0.18"
            ) from error
    if has_experts(modules):
        notes.append(
            "each expert has tensors of its own, which peft before 0.19 silently drops on "
            "transformers 5; for it write --experts fused-0.18"
        )
    return None, notes


def _ties(model: str) -> bool:
    """Whether the base ties its head; a base that has gone may."""
    try:
        return bool(read_config(resolve_model(model, weights=False)).get("tie_word_embeddings"))
    except ValueError:
        return True
