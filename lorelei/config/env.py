"""The environment: what happens between a prompt and its reward."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from lorelei.config.errors import nearest
from lorelei.config.section import FUNCTION, Section, in_a_file, tagged

BUILT_IN_TOOLS = ("calculator",)


class SingleTurnEnv(Section):
    """One answer, one score."""

    kind: Literal["single_turn"] = Field(default="single_turn", description="Which environment.")


class _Turns(Section):
    max_turns: int = Field(default=4, ge=1, description="Most answers of the model in one episode.")


class MultiTurnEnv(_Turns):
    """The model is told that its answer is wrong and may try again."""

    kind: Literal["multi_turn"] = Field(description="Which environment.")
    feedback: str = Field(
        default="That is not right. Try again.",
        min_length=1,
        description="What the user says to a wrong answer.",
    )
    solved: float = Field(
        default=1.0, description="A score of at least this ends the episode: the answer is right."
    )
    turn_discount: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="The reward is the last answer's score times this for every turn before it.",
    )


class ToolsEnv(_Turns):
    """The model may call tools; its first answer without a call is scored."""

    kind: Literal["tools"] = Field(description="Which environment.")
    tools: tuple[str, ...] = Field(
        default=BUILT_IN_TOOLS,
        min_length=1,
        description="'calculator', or functions of yours as 'tools.py:lookup'; the file's path is "
        "relative to the YAML file.",
    )
    timeout: float = Field(default=10.0, gt=0, description="Seconds for one call of a tool.")

    @field_validator("tools")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in BUILT_IN_TOOLS and FUNCTION.fullmatch(name) is None:
                raise ValueError(
                    f"{name!r} is neither built in nor FILE.py:FUNCTION; "
                    f"{nearest(name, BUILT_IN_TOOLS)}"
                )
        return value


class _YourCode(_Turns):
    path: Annotated[str, in_a_file("my_env.py:step")] = Field(
        description="'my_env.py:function', a file and a function in it; the file's path is "
        "relative to the YAML file."
    )


class PythonEnv(_YourCode):
    """A function of yours says what follows each answer."""

    kind: Literal["python"] = Field(description="Which environment.")
    timeout: float = Field(default=10.0, gt=0, description="Seconds for one call of the function.")


class AgentEnv(_YourCode):
    """A function of yours talks to the model through an OpenAI client."""

    kind: Literal["agent"] = Field(description="Which environment.")
    max_turns: int = Field(
        default=16, ge=1, description="Most completions that one episode may ask for."
    )
    timeout: float = Field(default=300.0, gt=0, description="Seconds for one episode.")


EnvConfig = Annotated[
    SingleTurnEnv | MultiTurnEnv | ToolsEnv | PythonEnv | AgentEnv,
    Field(discriminator="kind"),
    tagged(SingleTurnEnv, MultiTurnEnv, ToolsEnv, PythonEnv, AgentEnv),
]
