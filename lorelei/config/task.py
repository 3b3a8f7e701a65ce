"""The task: where the problems come from and how they become prompts."""

from __future__ import annotations

import string
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from lorelei.config.errors import FieldError
from lorelei.config.section import Section, tagged

PROMPT_TEMPLATE, ANSWER = "{question}", "answer"
# what the chat template is given by the run itself, or what would not reach it
_NOT_VARIABLES = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
        *("max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict"),
        *("return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    }
)


class _Task(Section):
    prompt_template: str = Field(
        default=PROMPT_TEMPLATE,
        description="The user's message; {field} is filled from the problem, {{ and }} are braces. "
        "With the default, a row's own chat (column messages or prompt) is the prompt.",
    )
    system_prompt: str | None = Field(
        default=None, description="A system message before it, and before a row's own chat."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict[str, Any],
        description="Variables of the model's chat template, such as {enable_thinking: false}.",
    )
    control_tokens: Literal["text", "tokens"] = Field(
        default="text",
        description="What control tokens of the model are, such as <|im_end|>, where they stand in "
        "rows, tools' results and messages of environments.",
    )
    max_prompt_tokens: int = Field(
        default=1024, ge=1, description="Longest prompt; see long_prompts."
    )
    eval_size: int | None = Field(
        default=None, ge=0, le=1_000_000, description="Problems held out. Default: eval.n_prompts."
    )

    @field_validator("prompt_template")
    @classmethod
    def _names_fields(cls, value: str) -> str:
        fields = [field for _, field, _, _ in string.Formatter().parse(value) if field is not None]
        if not fields:
            raise ValueError("it must name a field of the problem, such as {question}")
        for field in fields:
            # {question.attr} and {question[0]} would reach into objects
            if not field.isidentifier():
                raise ValueError(
                    f"'{{{field}}}' is not a field name; write a brace as {{{{ or }}}}"
                )
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _NOT_VARIABLES or not name.isidentifier():
                raise ValueError(f"{name!r} is no variable that can be given; remove it")
        return value


class MixtureItem(Section):
    """One reasoning-gym problem type of a mixture."""

    name: str = Field(description="A reasoning-gym dataset, such as chain_sum.")
    weight: float = Field(default=1.0, gt=0, description="Its share, relative to the others.")
    config: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="Options of the dataset."
    )


class ReasoningGymTask(_Task):
    """Generated problems of reasoning-gym; evaluation draws from another seed."""

    kind: Literal["reasoning_gym"] = Field(description="Which source.")
    name: str | None = Field(default=None, description="A dataset, such as chain_sum.")
    mixture: tuple[MixtureItem, ...] | None = Field(
        default=None, min_length=1, description="Several datasets, instead of `name`."
    )
    config: dict[str, Any] = Field(
        default_factory=dict[str, Any], description="Options of the dataset `name`."
    )
    size: int = Field(default=10_000, ge=1, description="Training problems of one epoch.")

    @property
    def title(self) -> str:
        return self.name or " + ".join(item.name for item in self.mixture or ())

    @model_validator(mode="after")
    def _name_or_mixture(self) -> ReasoningGymTask:
        if (self.name is None) == (self.mixture is None):
            raise FieldError("name", "give exactly one of name and mixture")
        if self.mixture is not None and self.config:
            raise FieldError("config", "belongs to `name`; give each entry of mixture its own")
        return self


class _DatasetTask(_Task):
    answer_field: str = Field(default=ANSWER, description="The column that holds the answer.")
    long_prompts: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="What becomes of overlong prompts: an error, or they are left out and counted.",
    )
    null_rows: Literal["refuse", "drop"] = Field(
        default="refuse", description="What becomes of rows that lack a prompt or an answer."
    )


class JsonlTask(_DatasetTask):
    """A file with one JSON object a line."""

    kind: Literal["jsonl"] = Field(description="Which source.")
    path: str = Field(description="The file; relative to the YAML file.")


class ParquetTask(_DatasetTask):
    """A parquet file."""

    kind: Literal["parquet"] = Field(description="Which source.")
    path: str = Field(description="The file; relative to the YAML file.")


class HfTask(_DatasetTask):
    """A data set of the Hugging Face hub."""

    kind: Literal["hf"] = Field(description="Which source.")
    path: str = Field(description="The data set's id, such as openai/gsm8k.")
    name: str | None = Field(default=None, description="Its configuration, such as main.")
    split: str = Field(default="train", description="Its split.")


TaskConfig = Annotated[
    ReasoningGymTask | JsonlTask | ParquetTask | HfTask,
    Field(discriminator="kind"),
    tagged(ReasoningGymTask, JsonlTask, ParquetTask, HfTask),
]
