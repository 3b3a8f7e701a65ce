"""Evaluation on held-out problems while training."""

from __future__ import annotations

from pydantic import Field

from lorelei.config.section import Section


class EvalConfig(Section):
    """How often, how much, and how completions are sampled for it."""

    every: int = Field(default=5, ge=0, description="Steps between evaluations; 0: never.")
    n_prompts: int = Field(default=128, ge=1, description="Held-out problems of one evaluation.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest completion. Default: rollout.max_new_tokens."
    )
    temperature: float = Field(default=0.0, ge=0, description="0: greedy.")
    top_k: int = Field(default=0, ge=0, description="Sample from the k likeliest tokens; 0: all.")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample from the likeliest tokens of this total mass."
    )
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="Drop tokens below this share of the likeliest one's."
    )
