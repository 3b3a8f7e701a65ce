"""transformers and peft, prepared as oracles; nothing in here is computed by our own decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorelei.config.errors import ConfigError
from lorelei.model.locate import resolve_model
from lorelei.types import AdapterSpec
from tests.decoders import DEVICE

# fp32: two orders of summation differ by about 1e-6; fp64: nothing but rounding is left
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def tolerance(dtype: torch.dtype, family: str) -> float:
    """A router's softmax is fp32 in transformers, on the CPU, and here, on DEVICE."""
    rounded = "moe" in family and DEVICE.type != "cpu"
    return max(TOLERANCE[dtype], 1e-7) if rounded else TOLERANCE[dtype]


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    got, expected = (x.detach().cpu().double() for x in (got, expected))
    return float((got - expected).norm() / expected.norm())


def hf_model(folder: Path, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """The checkpoint in transformers, frozen."""
    # the grouped kernel for experts has no fp64
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager", attn_implementation=attention
    )
    model.eval().requires_grad_(False)
    if dtype == torch.float64:
        _widen_norms(model)
    return model


def smollm2_folder() -> Path:
    """The real model; skips the test where it is not."""
    try:
        return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    except ConfigError:
        pytest.skip("SmolLM2-135M-Instruct is not on this machine; run `make model`")


def _widen_norms(model: nn.Module) -> None:
    """transformers rounds to fp32 inside every RMSNorm; torch's own has no such step."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)


def hf_logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """[T, V] of one sequence alone."""
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def peft_model(
    folder: Path,
    dtype: torch.dtype,
    spec: AdapterSpec,
    tensors: Mapping[str, Tensor],
    attention: str | None = None,
) -> PeftModel:
    """One adapter on the checkpoint in peft, holding exactly `tensors`."""
    whole = "all-linear" in spec.target_modules
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        use_rslora=spec.rslora,
        target_modules="all-linear" if whole else list(spec.target_modules),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(hf_model(folder, dtype, attention), config).to(dtype)
    outcome = set_peft_model_state_dict(model, dict(tensors))
    assert not outcome.unexpected_keys
    assert {plain_name(n) for n, p in model.named_parameters() if p.requires_grad} == set(tensors)
    return model


def plain_name(name: str) -> str:
    """peft's name of a live parameter -> the name it is saved under."""
    return name.replace(".default", "")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the adapter by the names it is saved under."""
    found = {plain_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {name: grad for name, grad in found.items() if grad is not None}
