"""The shape of an adapter. The names are those of AReaL and PEFT."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section, Words
from lorelei.types import FULL_WEIGHTS, AdapterSpec


class LoraConfig(Section):
    """LoRA matrices on the base model's linear layers."""

    use_lora: bool = Field(
        default=True,
        description="Train an adapter. false: train all weights of the model (full fine-tuning, "
        "one experiment, float32); the other fields then mean nothing.",
    )
    lora_rank: int = Field(default=16, ge=1, le=512, description="Rank r of A [r, in], B [out, r].")
    lora_alpha: float = Field(default=32.0, gt=0, description="The adapter acts with alpha / r.")
    target_modules: Words = Field(
        default=("all-linear",),
        min_length=1,
        description="Linear layers that get an adapter: all-linear (never lm_head or a router), "
        "or names, name endings or full-match regular expressions.",
    )
    exclude_modules: Words = Field(
        default=(), description="Linear layers left out, written like target_modules."
    )
    peft_type: Literal["lora"] = Field(default="lora", description="The kind of adapter.")
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r) instead.")
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input while training."
    )
    init_from: str | None = Field(
        default=None,
        description="A folder in PEFT's format to start from (warm start); its path is relative to "
        "the YAML file. Default: A random, B zero.",
    )

    @model_validator(mode="after")
    def _starts_from_an_adapter(self) -> LoraConfig:
        if self.init_from is not None and not self.use_lora:
            raise FieldError(
                "init_from",
                f"{self.init_from!r} is an adapter, and use_lora: false trains none; remove it "
                "(a checkpoint to start from is `model`)",
            )
        return self

    def spec(self) -> AdapterSpec:
        """What engines need to know of it."""
        if not self.use_lora:
            return FULL_WEIGHTS
        return AdapterSpec(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            rslora=self.use_rslora,
            dropout=self.lora_dropout,
        )
