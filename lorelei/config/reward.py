"""The reward: what scores a rollout, and the worker processes that run it."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lorelei.config.section import Section, in_a_file, tagged


class _Reward(Section):
    timeout: float = Field(default=10.0, gt=0, description="Seconds for one score; then it fails.")
    workers: int = Field(default=2, ge=1, le=1024, description="Processes that run the scorer.")
    memory_gib: float = Field(
        default=4.0, gt=0, description="Most memory of a worker, and of each process it starts."
    )
    start_timeout: float = Field(
        default=120.0, gt=0, description="Seconds for a worker to load the scorer."
    )
    output_kib: int = Field(
        default=256, ge=0, description="Most of what the workers print that is shown in a run."
    )
    trial: bool = Field(
        default=True, description="Score a sample before anything is loaded, and stop if it fails."
    )
    weights: dict[str, float] = Field(
        default_factory=dict[str, float],
        description="The reward as a weighted sum of what the scorer reports, such as {strict: "
        "0.5, lenient: 0.5}. Default: the scorer's own value.",
    )


class ReasoningGymReward(_Reward):
    """The scorer of the reasoning-gym problem itself."""

    kind: Literal["reasoning_gym"] = Field(description="Which scorer.")
    answer_after: str | None = Field(
        default=None,
        min_length=1,
        description="The answer is what stands after the last of these, such as '='. Default, and "
        "where there is none: what stands in <answer> tags, or else the whole completion.",
    )


class MathVerifyReward(_Reward):
    """1 when math-verify finds the completion's answer equal to the problem's, else 0."""

    kind: Literal["math_verify"] = Field(description="Which scorer.")


class PythonReward(_Reward):
    """A function of yours."""

    kind: Literal["python"] = Field(description="Which scorer.")
    path: Annotated[str, in_a_file("rewards.py:my_reward")] = Field(
        description="'rewards.py:my_reward', a file and a function in it; the file's path is "
        "relative to the YAML file."
    )

    env: tuple[str, ...] = Field(
        default=(),
        description="Environment variables that it gets though they look like secrets, such as "
        "[OPENAI_API_KEY]. Default: tokens, keys and passwords are withheld.",
    )

    @field_validator("env")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if re.fullmatch(r"[A-Za-z_]\w*", name) is None:
                raise ValueError("write the names of variables, such as OPENAI_API_KEY")
        return value


class EnvReward(Section):
    """What the environment itself gives (env.kind python or agent)."""

    workers: ClassVar[int] = 0

    kind: Literal["env"] = Field(description="Which scorer.")


ScorerConfig = ReasoningGymReward | MathVerifyReward | PythonReward
RewardConfig = Annotated[
    ScorerConfig | EnvReward,
    Field(discriminator="kind"),
    tagged(ReasoningGymReward, MathVerifyReward, PythonReward, EnvReward),
]
