"""The optimizer of one adapter, and how its learning rate changes."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section, is_mapping
from lorelei.types import AdamHyper


class OptimizerConfig(Section):
    """AdamW, and the schedule of its rate."""

    lr: float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="How the rate falls after the warm-up."
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="The rate falls to this share of lr, not to zero."
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps until the rate is at its peak.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's beta1.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's beta2.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    gradient_clipping: float = Field(
        default=1.0, ge=0, description="Largest gradient norm of an adapter; 0: no clipping."
    )

    @model_validator(mode="after")
    def _falls(self) -> OptimizerConfig:
        if self.min_lr_ratio and self.lr_schedule == "constant":
            raise FieldError(
                "min_lr_ratio",
                f"{self.min_lr_ratio} does nothing with lr_schedule: constant; remove it, or use "
                "cosine or linear",
            )
        return self

    def _above_least(self, share: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * share

    def at(self, step: int, steps: int) -> AdamHyper:
        """The numbers of step 0 <= `step` < `steps`: warm-up, then the schedule."""
        rate = self.lr
        if step < self.warmup_steps:
            rate *= (step + 1) / (self.warmup_steps + 1)
        else:
            done = (step - self.warmup_steps) / max(steps - self.warmup_steps, 1)
            match self.lr_schedule:
                case "constant":
                    pass
                case "linear":
                    rate *= self._above_least(1 - done)
                case "cosine":
                    rate *= self._above_least(0.5 * (1 + math.cos(math.pi * done)))
        return AdamHyper(
            lr=rate,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.gradient_clipping,
        )


def from_algo(data: Any, *, replace: bool = False) -> Any:
    """Keys of the optimizer that stand in `algo`, as in earlier files, moved to `optimizer`.

    replace: what stands in `algo` is newer. Otherwise raises FieldError for a key that both have.
    """
    if not is_mapping(data) or not is_mapping(algo := data.get("algo")):
        return data
    moved = {key: value for key, value in algo.items() if key in OptimizerConfig.model_fields}
    optimizer: Any = data.get("optimizer") or {}
    if not moved or not is_mapping(optimizer):
        return data
    for key in () if replace else moved:
        if key in optimizer:
            raise FieldError(f"algo.{key}", f"is optimizer.{key} too; give one of them")
    kept = {key: value for key, value in algo.items() if key not in moved}
    return {**data, "algo": kept, "optimizer": {**optimizer, **moved}}
