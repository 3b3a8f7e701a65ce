"""The rollout engine, and how completions are sampled for training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section

_TRUNCATION = (
    "is refused in training: the log-probabilities of a truncated distribution are not those the "
    "loss needs; remove it (eval.{0} is allowed)"
)


class EmbeddedRollout(Section):
    """Sampling in the trainer's process, on the same base model."""

    refused: ClassVar[Mapping[str, str]] = {
        key: _TRUNCATION.format(key) for key in ("top_k", "top_p", "min_p")
    }
    per_adapter: ClassVar[frozenset[str]] = frozenset(
        {"n_samples", "max_new_tokens", "temperature", "stop_strings"}
    )

    kind: Literal["embedded"] = Field(default="embedded", description="Which rollout engine.")
    n_samples: int = Field(default=8, ge=1, description="Rollouts of each prompt: a group.")
    max_new_tokens: int = Field(default=64, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(default=1.0, description="Sampling temperature, above 0.")
    stop_strings: tuple[str, ...] = Field(
        default=(), description="A completion ends when its text contains one of these."
    )
    max_head_offpolicyness: int = Field(
        default=0, ge=0, description="Most steps that training may be ahead of sampling; 0: none."
    )
    interruptible: bool = Field(
        default=False,
        description="A published version takes over the answers that are being sampled at once, "
        "behind the tokens they have; else they finish on theirs.",
    )
    max_concurrent: int | None = Field(
        default=None,
        ge=1,
        description="Most groups in flight for each adapter. "
        "Default: (max_head_offpolicyness + 1) * algo.batch_size.",
    )
    max_running: int = Field(default=64, ge=1, description="Most sequences decoded at once.")
    max_context: int | None = Field(
        default=None,
        ge=2,
        description="Most tokens of a sequence. Default: the model's.",
    )

    @field_validator("temperature")
    @classmethod
    def _not_greedy(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                "greedy samples of a prompt are all the same and teach nothing; use a value above 0"
            )
        return value

    @field_validator("stop_strings", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("stop_strings")
    @classmethod
    def _none_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would stop every completion; remove it")
        return value

    @model_validator(mode="after")
    def _something_to_interrupt(self) -> EmbeddedRollout:
        if self.interruptible and self.max_head_offpolicyness == 0:
            raise FieldError(
                "interruptible",
                "true does nothing with max_head_offpolicyness: 0, where nothing is sampled while "
                "a version is published; set it to 1 or more, or interruptible: false",
            )
        return self

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> EmbeddedRollout:
        if self.max_context is not None and self.max_new_tokens >= self.max_context:
            raise FieldError(
                "max_new_tokens",
                f"{self.max_new_tokens} leaves no room for a prompt in max_context: "
                f"{self.max_context}; lower one or raise the other",
            )
        return self


RolloutConfig = EmbeddedRollout
