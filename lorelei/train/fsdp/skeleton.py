"""A causal language model of transformers on the meta device, its linear layers replaced by ours.

Nothing here holds a weight.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorelei.lora.targets import HEAD
from lorelei.model.config import UnsupportedModel
from lorelei.model.load import CheckpointError
from lorelei.parallel.mesh import Axis
from lorelei.train.fsdp.attention import NAME
from lorelei.train.fsdp.binding import Binding
from lorelei.train.fsdp.experts import HostedExperts, is_experts
from lorelei.train.fsdp.linear import Cut, HostedLinear, Style

_ATTENTIONS = {"full_attention", "sliding_attention"}
_STYLES: dict[str, Style] = {
    "colwise": "colwise",
    "rowwise": "rowwise",
    "colwise_gather_output": "colwise_gather_output",
    "colwise_rep": "colwise_gather_output",
    "rowwise_split_input": "rowwise_split_input",
    "rowwise_rep": "rowwise_split_input",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The model, and where its parts are."""

    lm: PreTrainedModel
    blocks: tuple[nn.Module, ...]  # those that are recomputed and sharded one by one
    hosted: tuple[HostedLinear, ...]  # in order of execution, as far as modules are
    head: HostedLinear
    binding: Binding


def build_skeleton(folder: Path, dtype: torch.dtype, tensor: Axis) -> Skeleton:
    """Raises UnsupportedModel or CheckpointError with one clear line."""
    config = _config(folder)
    try:
        with torch.device("meta"):
            lm: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=NAME, experts_implementation="eager"
            )
    except (AttributeError, ImportError, KeyError, TypeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"model: transformers cannot build the model of {folder / 'config.json'}: {reason}; is "
            "it complete?"
        ) from error
    lm.eval().requires_grad_(False)
    if tensor.size > 1:
        _check_heads(config, tensor.size)
    binding = Binding()
    hosted = _replace(lm, _plan(lm, tensor), tensor, binding)
    head = lm.get_output_embeddings()
    if all(module is head for module in hosted):
        raise UnsupportedModel(
            f"model: {type(lm).__name__} has no torch.nn.Linear in its blocks, which an adapter "
            "could be on; use a model of another architecture"
        )
    blocks = tuple(m for m in lm.modules() if isinstance(m, GradientCheckpointingLayer))
    if not isinstance(head, HostedLinear) or not blocks:
        raise UnsupportedModel(
            f"model: {type(lm).__name__} has no linear head on a row of blocks, as train.kind "
            "fsdp needs it"
        )
    return Skeleton(lm=lm, blocks=blocks, hosted=tuple(hosted), head=head, binding=binding)


def _config(folder: Path) -> Any:
    if not (folder / "config.json").exists():
        raise CheckpointError(f"model: {folder} has no config.json, as train.kind fsdp needs it")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModel(f"model: transformers cannot read {folder}: {reason}") from error
    if config.get_text_config() is not config:
        raise UnsupportedModel(
            f"model: {config.model_type} is not of text alone, as train.kind fsdp needs it; use a "
            "checkpoint of its language model"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"model: {folder} has quantised weights; train.kind fsdp wants the unquantised ones"
        )
    kinds = set(getattr(config, "layer_types", None) or _ATTENTIONS)
    if unknown := sorted(kinds - _ATTENTIONS):
        raise UnsupportedModel(
            f"model: layers of {unknown[0]} of {config.model_type} would mix packed sequences; "
            f"supported: {', '.join(sorted(_ATTENTIONS))}"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedModel(f"model: {config.model_type} is no causal language model")
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    if not getattr(kind, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"model: {kind.__name__} does not let its attention be replaced, and train.kind fsdp "
            "needs one that keeps packed sequences apart"
        )
    return config


def _check_heads(config: Any, size: int) -> None:
    heads = config.num_attention_heads
    for what, count in (
        ("attention heads", heads),
        ("key/value heads", getattr(config, "num_key_value_heads", None) or heads),
    ):
        if count % size:
            raise UnsupportedModel(
                f"train.tensor_parallel: {size} does not divide the {count} {what} of the model; "
                "use a number that does, or train.data_parallel"
            )


def _plan(lm: PreTrainedModel, tensor: Axis) -> Mapping[re.Pattern[str], str]:
    """transformers' tensor-parallel plan by patterns of module names; empty without."""
    if tensor.size == 1:
        return {}
    below = getattr(lm.config, "base_model_tp_plan", None)
    if not below:
        raise UnsupportedModel(
            f"train.tensor_parallel: transformers has no plan for {type(lm).__name__}; set it to 1"
        )
    prefix = lm.base_model_prefix
    return {
        re.compile(re.escape(f"{prefix}.{name}").replace(r"\*", r"\d+")): style
        for name, style in below.items()
    }


def _style(name: str, plan: Mapping[re.Pattern[str], str]) -> Style:
    planned = _planned(name, "", plan, _STYLES)
    return "replicated" if planned is None else _STYLES[planned]


def _planned(
    name: str, parameter: str, plan: Mapping[re.Pattern[str], str], built: Container[str]
) -> str | None:
    """What the plan wants for a module, or for a parameter of it; None: nothing."""
    whole = name + parameter
    planned = next((style for pattern, style in plan.items() if pattern.fullmatch(whole)), None)
    if planned is not None and planned not in built:
        raise UnsupportedModel(
            f"train.tensor_parallel: the plan of transformers wants {planned!r} for {name}, which "
            "is not built; set it to 1"
        )
    return planned


def _replace(
    lm: PreTrainedModel, plan: Mapping[re.Pattern[str], str], tensor: Axis, binding: Binding
) -> list[HostedLinear]:
    """Replace linear layers and experts by ours, and list them."""
    head = lm.get_output_embeddings()
    found: list[HostedLinear] = []
    for name, module in list(lm.named_modules()):
        if is_experts(module):
            cut_up = _planned(name, ".gate_up_proj", plan, {"packed_colwise"}) is not None
            experts = HostedExperts(name, module, cut_up, tensor, binding)
            lm.set_submodule(name, experts)
            found += [m for m in experts.modules() if isinstance(m, HostedLinear)]
        elif type(module) is nn.Linear and not _is_router(name, module, lm.config):
            try:
                cut = Cut.of(_style(name, plan), tensor, *module.weight.shape)
            except ValueError as error:
                raise UnsupportedModel(f"train.tensor_parallel: {name}: {error}") from error
            ours = HostedLinear(HEAD if module is head else name, module, cut, binding)
            if module is head:
                ours.weight = cast(nn.Parameter, module.weight)  # which may be the embedding's
                lm.set_output_embeddings(ours)
            else:
                lm.set_submodule(name, ours)
            found.append(ours)
    return found


def _is_router(name: str, module: nn.Linear, config: Any) -> bool:
    """A router is never adapted."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    leaf = name.rpartition(".")[2]
    return experts is not None and module.out_features == experts and leaf in ("gate", "router")
