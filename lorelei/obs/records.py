"""Records of a run: what one line of metrics.jsonl says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isfinite, nan
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One committed step of one adapter. A number that was not recorded is NaN."""

    step: int
    adapter: str
    version: int = 0
    failed_rollouts: int = 0
    time: float = nan  # unix seconds
    reward: float = nan
    reward_std: float = nan
    loss: float = nan
    grad_norm: float = nan
    kl_sampler: float = nan
    kl_teacher: float = nan
    ratio_max: float = nan
    dropped_stale: float = nan  # share of finished groups that had become too old
    trainer_idle: float = nan  # share of the step that it waited for rollouts
    rollout_idle: float = nan  # share of the step without a request in flight
    staleness_mean: float = nan
    staleness_max: float = nan
    generated_tokens: float = nan
    trained_tokens: float = nan
    completion_tokens_mean: float = nan
    truncated: float = nan  # fraction of completions that hit max_new_tokens
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    errors: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def step_seconds(self) -> float:
        """Wall-clock seconds of the whole step, NaN when not recorded."""
        return self.seconds.get("step", nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One held-out evaluation of one adapter."""

    step: int
    adapter: str
    scores: Mapping[str, float]


_PHASES = {"rollout": "wait"}  # the names of earlier runs
_NUMBERS = tuple(f.name for f in fields(StepRecord) if f.type == "float")


def step_record(raw: Mapping[str, Any]) -> StepRecord:
    """A step from its JSON object. Raises ValueError when 'step' or 'adapter' is absent."""
    return StepRecord(
        step=int(_required(raw, "step")),
        adapter=str(_required(raw, "adapter")),
        version=int(raw.get("version") or 0),
        failed_rollouts=int(raw.get("failed_rollouts") or 0),
        **{name: _number(raw.get(name)) for name in _NUMBERS},
        seconds={_PHASES.get(k, k): _number(v) for k, v in _mapping(raw, "seconds").items()},
        errors={name: int(count) for name, count in _mapping(raw, "errors").items() if count},
    )


def eval_record(raw: Mapping[str, Any]) -> EvalRecord:
    """An evaluation from its JSON object. Raises ValueError when a needed key is absent."""
    return EvalRecord(
        step=int(_required(raw, "step")),
        adapter=str(_required(raw, "adapter")),
        # A score that is null or NaN was not measured: absent, so that nobody draws or averages it.
        scores={
            str(k): float(v) for k, v in _required(raw, "scores").items() if isfinite(_number(v))
        },
    )


def _number(value: Any) -> float:
    return nan if value is None else float(value)


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return raw.get(key) or {}


def _required(raw: Mapping[str, Any], key: str) -> Any:
    if key not in raw:
        raise ValueError(f"record {raw.get('kind', '?')}: '{key}' is absent; it is needed")
    return raw[key]
