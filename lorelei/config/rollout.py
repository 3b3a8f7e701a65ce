"""The rollout engine, and how completions are sampled, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.extra_args import SGLANG, VLLM, check_extra_args
from lorelei.config.section import Section, Words, tagged

_TRUNCATION = (
    "is refused in training: the log-probabilities of a truncated distribution are not those the "
    "loss needs; remove it (eval.{0} is allowed)"
)


Scalar = bool | int | float | str


class Sampling(Section):
    """What every rollout engine has; `rollout` without a kind is embedded."""

    refused: ClassVar[Mapping[str, str]] = {
        key: _TRUNCATION.format(key) for key in ("top_k", "top_p", "min_p")
    }
    per_adapter: ClassVar[frozenset[str]] = frozenset(
        {"n_samples", "max_new_tokens", "temperature", "stop_strings"}
    )

    n_samples: int = Field(
        default=8, ge=1, le=65_536, description="Rollouts of each prompt: a group."
    )
    max_new_tokens: int = Field(default=64, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(default=1.0, description="Sampling temperature, above 0.")
    stop_strings: Words = Field(
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
    max_running: int = Field(
        default=64, ge=1, description="Most sequences decoded at once, by each server."
    )
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

    @field_validator("stop_strings")
    @classmethod
    def _none_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string would stop every completion; remove it")
        return value

    @model_validator(mode="after")
    def _something_to_interrupt(self) -> Sampling:
        if self.interruptible and self.max_head_offpolicyness == 0:
            raise FieldError(
                "interruptible",
                "true does nothing with max_head_offpolicyness: 0, where nothing is sampled while "
                "a version is published; set it to 1 or more, or interruptible: false",
            )
        return self

    @model_validator(mode="after")
    def _room_for_a_prompt(self) -> Sampling:
        if self.max_context is not None and self.max_new_tokens >= self.max_context:
            raise FieldError(
                "max_new_tokens",
                f"{self.max_new_tokens} leaves no room for a prompt in max_context: "
                f"{self.max_context}; lower one or raise the other",
            )
        return self


class EmbeddedRollout(Sampling):
    """Sampling in the trainer's process, on the same base model."""

    kind: Literal["embedded"] = Field(default="embedded", description="Which rollout engine.")


class ServerRollout(Sampling):
    """What the engines that are servers have."""

    derived: ClassVar[Mapping[str, str]]  # options of the server that follow from the run

    replicas: int = Field(default=1, ge=1, description="Servers to start on this machine.")
    tensor_parallel_size: int = Field(
        default=1, ge=1, description="Processes that share each server's model."
    )
    urls: Words = Field(
        default=(),
        description="Attach to servers that run already instead of starting any; their token is in "
        "the environment variable LORELEI_SERVER_TOKEN.",
    )
    reserve_rank: int = Field(
        default=0, ge=0, le=512, description="Room for adapters of this rank that come later."
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="CPU threads of each process of a server."
    )
    cpu_cache_gib: int = Field(
        default=2, ge=1, description="Memory for keys and values of a server on a CPU."
    )
    extra_args: dict[str, Scalar] = Field(
        default_factory=dict[str, Scalar],
        description="Options of the server by its own names; those that follow from the run are "
        "refused.",
    )

    @field_validator("urls")
    @classmethod
    def _are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is no URL; write http://host:port")
        return value

    @model_validator(mode="after")
    def _starts_or_attaches(self) -> ServerRollout:
        names = ("replicas", "tensor_parallel_size", "extra_args", "threads", "reserve_rank")
        for name in (*names, "cpu_cache_gib"):
            if self.urls and name in self.model_fields_set:
                raise FieldError(
                    name, "means nothing with urls: those servers run already; remove one"
                )
        check_extra_args(self.derived, self.extra_args)
        return self


class VllmRollout(ServerRollout):
    """vLLM servers; `make vllm` installs them."""

    derived: ClassVar[Mapping[str, str]] = VLLM

    kind: Literal["vllm"] = Field(description="Which rollout engine.")


class SglangRollout(ServerRollout):
    """SGLang servers; `make sglang` installs them."""

    derived: ClassVar[Mapping[str, str]] = SGLANG

    kind: Literal["sglang"] = Field(description="Which rollout engine.")


class EvalConfig(Section):
    """How often, how much, and how completions are sampled for it."""

    every: int = Field(default=5, ge=0, description="Steps between evaluations; 0: never.")
    n_prompts: int = Field(
        default=128, ge=1, le=1_000_000, description="Held-out problems of one evaluation."
    )
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


AnyServer = VllmRollout | SglangRollout

RolloutConfig = Annotated[
    EmbeddedRollout | AnyServer,
    Field(discriminator="kind"),
    tagged(EmbeddedRollout, VllmRollout, SglangRollout, default="embedded"),
]
