"""One adapter's experiment: the run's defaults with that adapter's overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, ValidationError, model_validator

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.grpo import Grpo
from lorelei.algo.kinds import AlgoConfig, fields_of
from lorelei.config.env import EnvConfig, MultiTurnEnv, SingleTurnEnv
from lorelei.config.errors import ConfigError, FieldError, describe
from lorelei.config.lora import LoraConfig
from lorelei.config.optimizer import OptimizerConfig, from_algo
from lorelei.config.reward import EnvReward, ReasoningGymReward, RewardConfig
from lorelei.config.rollout import (
    EmbeddedRollout,
    EvalConfig,
    RolloutConfig,
    Sampling,
    SglangRollout,
    VllmRollout,
)
from lorelei.config.section import Raw, Section, is_mapping
from lorelei.config.task import ANSWER, ReasoningGymTask, TaskConfig

_OWN_REWARD = frozenset({"python", "agent"})  # environments that may give the reward themselves
_FOR_THE_RUN = "belongs to the whole run, not to one adapter; move it to the top level"

_ROLLOUT_FIELDS = {
    f for kind in (EmbeddedRollout, VllmRollout, SglangRollout) for f in kind.model_fields
}


class ExperimentDefaults(Section):
    """What every adapter of a run has unless it says otherwise."""

    seed: int = Field(default=0, ge=0, description="Seed of data order, sampling and adapters.")
    steps: int = Field(default=30, ge=1, description="Training steps.")
    lora: LoraConfig = Field(default_factory=LoraConfig, description="The adapter.")
    task: TaskConfig | None = Field(default=None, description="Where the problems come from.")
    env: EnvConfig = Field(
        default_factory=SingleTurnEnv,
        description="What happens between a prompt and its reward. Default: one answer.",
    )
    reward: RewardConfig | None = Field(
        default=None,
        description="What scores a rollout. Default: the task's own scorer; where it has none, "
        "what an environment of kind python or agent gives. An algorithm that learns without a "
        "reward has none then.",
    )
    algo: AlgoConfig = Field(default_factory=Grpo, description="What it learns from, and how.")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="AdamW and its schedule."
    )
    rollout: RolloutConfig = Field(default_factory=EmbeddedRollout, description="How it samples.")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="How it is evaluated.")

    @model_validator(mode="before")
    @classmethod
    def _optimizer_of_algo(cls, data: Any) -> Any:
        return from_algo(data)


class AdapterOverrides(Section):
    """An entry of `adapters`: any part of a section replaces that part of the defaults."""

    refused: ClassVar[Mapping[str, str]] = {
        key: _FOR_THE_RUN
        for key in ("model", "dtype", "train", "publish", "checkpoint", "threads", "runs_dir")
    }

    seed: int | None = Field(default=None, description="See the run's.")
    steps: int | None = Field(default=None, description="See the run's.")
    lora: Raw = Field(default_factory=Raw, description="Overrides of `lora`.")
    task: Raw = Field(default_factory=Raw, description="Overrides of `task`.")
    env: Raw = Field(default_factory=Raw, description="Overrides of `env`.")
    reward: Raw = Field(default_factory=Raw, description="Overrides of `reward`.")
    algo: Raw = Field(default_factory=Raw, description="Overrides of `algo`.")
    optimizer: Raw = Field(default_factory=Raw, description="Overrides of `optimizer`.")
    rollout: Raw = Field(
        default_factory=Raw,
        description=f"Overrides of `rollout`: {', '.join(sorted(Sampling.per_adapter))}.",
    )
    eval: Raw = Field(default_factory=Raw, description="Overrides of `eval`.")

    @model_validator(mode="before")
    @classmethod
    def _optimizer_of_algo(cls, data: Any) -> Any:
        return from_algo(data)

    @model_validator(mode="after")
    def _only_sampling(self) -> AdapterOverrides:
        for key in self.rollout:
            if key in _ROLLOUT_FIELDS and key not in Sampling.per_adapter:
                raise FieldError(f"rollout.{key}", _FOR_THE_RUN)
        return self


class Experiment(Section):
    """Everything that one adapter's training is made of; checked as a whole."""

    name: str
    seed: int
    steps: int
    lora: LoraConfig
    task: TaskConfig
    env: EnvConfig
    reward: RewardConfig | None  # None: nothing is scored
    algo: AlgoConfig
    optimizer: OptimizerConfig
    rollout: RolloutConfig
    eval: EvalConfig

    @property
    def samples(self) -> bool:
        """Whether it is trained on rollouts."""
        return self.algo.job == "rl"

    @property
    def max_concurrent(self) -> int:
        """Most groups in flight."""
        limit = self.rollout.max_concurrent
        return limit or (self.rollout.max_head_offpolicyness + 1) * self.algo.batch_size

    @property
    def eval_size(self) -> int:
        """Problems held out for evaluation; none when it is off."""
        if self.task.eval_size is not None:
            return self.task.eval_size
        return self.eval.n_prompts if self.eval.every else 0

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if isinstance(self.algo, PolicyAlgorithm):
            _check_statistics(self.algo, self.rollout)
            _check_credit(self.algo, self.rollout, self.env)
        if isinstance(self.reward, ReasoningGymReward) and self.task.kind != "reasoning_gym":
            raise FieldError(
                "reward.kind",
                f"'reasoning_gym' cannot score task.kind {self.task.kind!r}; "
                "use math_verify or python",
            )
        if isinstance(self.reward, EnvReward) and self.env.kind not in _OWN_REWARD:
            raise FieldError(
                "reward.kind",
                f"'env' with env.kind {self.env.kind!r}, which gives no reward of its own; "
                "use another scorer, or env.kind python or agent",
            )
        if self.eval.every and self.eval_size < self.eval.n_prompts:
            raise FieldError(
                "eval.n_prompts",
                f"{self.eval.n_prompts} is more than task.eval_size: {self.eval_size}; "
                "lower it or raise task.eval_size",
            )
        return self


def resolve(name: str, defaults: ExperimentDefaults, overrides: AdapterOverrides) -> Experiment:
    """The experiment of one adapter. Raises ConfigError with the whole line."""
    # unset fields stay out: their defaults may follow from what is overridden
    fields = set(ExperimentDefaults.model_fields)
    data = _merge_sections(
        defaults.model_dump(include=fields, exclude_unset=True),
        overrides.model_dump(exclude_unset=True),
    )
    prefix = f"adapters.{name}" if overrides.model_fields_set else ""
    try:
        merged = ExperimentDefaults.model_validate(data)
    except ValidationError as error:
        raise ConfigError(describe(error, data, prefix)) from error
    dotted = f"{prefix}." if prefix else ""
    if merged.task is None:
        raise ConfigError(f"{dotted}task: is required, such as {{kind: reasoning_gym, name: ...}}")
    reward, evaluation = merged.reward, merged.eval
    if merged.algo.job != "rl":
        refuse_unused(overrides if prefix else defaults, merged.algo.kind, dotted)
        if isinstance(merged.task, ReasoningGymTask):
            raise ConfigError(
                f"{dotted}task.kind: 'reasoning_gym' makes problems to be scored, without answers "
                f"that a model could imitate, which algo.kind: {merged.algo.kind} learns from; use "
                "jsonl, parquet or hf"
            )
        if merged.algo.job == "preference" and merged.task.answer_field != ANSWER:
            raise ConfigError(
                f"{dotted}task.answer_field: {merged.task.answer_field!r} has no effect with "
                f"algo.kind: {merged.algo.kind}, whose answers are in columns of their own; "
                "remove it"
            )
        reward = None
    elif reward is None:
        if isinstance(merged.task, ReasoningGymTask):
            reward = ReasoningGymReward(kind="reasoning_gym")
        elif not merged.algo.needs_reward:
            _refuse_scores(overrides if prefix else defaults, merged, dotted)
            evaluation = evaluation.model_copy(update={"every": 0})
        elif merged.env.kind in _OWN_REWARD:
            reward = EnvReward(kind="env")
        else:
            raise ConfigError(
                f"{dotted}reward: is required for task.kind {merged.task.kind!r}; "
                "use {kind: math_verify} or {kind: python, path: rewards.py:my_reward}"
            )
    parts = {field: getattr(merged, field) for field in fields}
    parts |= {"name": name, "reward": reward, "eval": evaluation}
    try:
        return Experiment.model_validate(parts)
    except ValidationError as error:
        raise ConfigError(describe(error, {}, prefix)) from error


def _merge_sections(base: Raw, over: Raw) -> Raw:
    """`over` on top of `base`, without what means nothing to another task or reward."""
    base = dict(base)
    if "kind" in over.get("algo", {}):
        # what this algorithm does not have means nothing to it
        base["algo"] = fields_of(over["algo"]["kind"], base.get("algo", {}))
    for section in ("task", "env", "reward"):
        below, above = base.get(section), over.get(section)
        if below is None or above is None:
            continue
        if "kind" in above and above["kind"] != below.get("kind"):
            del base[section]
        elif section == "task" and ("name" in above or "mixture" in above):
            stale = ("name", "mixture", "config")
            base[section] = {k: v for k, v in below.items() if k not in stale}
    return _merge(base, over)


def _merge(base: Raw, over: Raw) -> Raw:
    """`over` on top of `base`, deep."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if is_mapping(below) and is_mapping(value):
            value = _merge(below, value)
        merged[key] = value
    return merged


SAMPLED: Mapping[str, frozenset[str] | None] = {
    # what means nothing where nothing is sampled; None: the whole section
    "reward": None,
    "env": None,
    "rollout": Sampling.per_adapter,
    "eval": frozenset({"max_new_tokens", "temperature", "top_k", "top_p", "min_p"}),
}


def refuse_unused(given: Section, kind: str, dotted: str = "") -> None:
    """Raises ConfigError for what was given to adapters that sample nothing.

    kind: of their algorithm. dotted: where `given` stands in the file, with a dot behind it.
    """
    for name, keys in SAMPLED.items():
        section = getattr(given, name)
        if name not in given.model_fields_set or section is None:
            continue
        found = set(section) if is_mapping(section) else section.model_fields_set
        unused = sorted(found if keys is None else found & keys)
        if unused:
            key = name if keys is None else f"{name}.{unused[0]}"
            raise ConfigError(
                f"{dotted}{key}: has no effect with algo.kind: {kind}, which samples nothing; "
                "remove it"
            )


def _refuse_scores(
    given: ExperimentDefaults | AdapterOverrides, merged: ExperimentDefaults, dotted: str
) -> None:
    """Raises ConfigError for what needs the scores of an adapter that has no reward.

    given: the adapter's own sections.
    """
    fix = "give a reward, such as {kind: math_verify}"
    if isinstance(merged.env, MultiTurnEnv):
        raise ConfigError(
            f"{dotted}env.kind: 'multi_turn' tells right answers from wrong ones by their reward, "
            f"and there is none; {fix}, or use another environment"
        )
    section = given.eval if "eval" in given.model_fields_set else Raw()
    asked = section.model_dump(exclude_unset=True) if isinstance(section, EvalConfig) else section
    if asked and asked.get("every") != 0:
        raise ConfigError(
            f"{dotted}eval: has no effect without a reward, by which held-out answers are scored; "
            f"{fix}, or set eval.every: 0"
        )


def _check_credit(algo: PolicyAlgorithm, rollout: RolloutConfig, env: EnvConfig) -> None:
    buffer = algo.overlong_penalty.buffer if algo.overlong_penalty else None
    if buffer is not None and buffer > rollout.max_new_tokens:
        raise FieldError(
            "algo.overlong_penalty.buffer",
            f"{buffer} is more than rollout.max_new_tokens: {rollout.max_new_tokens}, so that "
            "every answer would be penalised; lower it",
        )
    if algo.turn_discount < 1 and env.kind == "single_turn":
        raise FieldError(
            "algo.turn_discount",
            f"{algo.turn_discount:g} does nothing with env.kind: single_turn, whose answers have "
            "one turn; remove it, or use another environment",
        )


def _check_statistics(algo: PolicyAlgorithm, rollout: RolloutConfig) -> None:
    if "group" in algo.statistics and rollout.n_samples < 2:
        raise FieldError(
            "rollout.n_samples",
            f"{rollout.n_samples} gives algo.kind {algo.kind!r} no statistics of a group; "
            "use 2 or more",
        )
    if algo.drop_zero_variance_groups and rollout.n_samples < 2:
        raise FieldError(
            "algo.drop_zero_variance_groups",
            "true drops every group of rollout.n_samples: 1, whose rewards are all equal; "
            "set it to false, or use 2 samples or more",
        )
    if "batch" in algo.statistics and rollout.n_samples * algo.batch_size < 2:
        raise FieldError(
            "algo.batch_size",
            f"{algo.batch_size} with rollout.n_samples: {rollout.n_samples} gives no statistics "
            "of a batch; use 2 or more of one of them",
        )
