"""The prompts, or the examples, of a task's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorelei.config.task import HfTask, JsonlTask, MixtureItem, ParquetTask, TaskConfig
from lorelei.data.contract import PromptSource
from lorelei.data.examples import ExampleRenderer, ExampleSource
from lorelei.data.reader import Rows, read_hf, read_jsonl, read_parquet
from lorelei.data.renderer import Renderer
from lorelei.data.rows import RowSource

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer


def make_source(
    task: TaskConfig, tokenizer: Tokenizer, seed: int, *, eval_size: int
) -> PromptSource:
    """The prompts of a task, of which `eval_size` are held out.

    Files are read and rendered whole. Raises ValueError for data that cannot be used.
    """
    renderer = _renderer(task, tokenizer)
    if task.kind == "reasoning_gym":
        from lorelei.data.reasoning_gym import ReasoningGymSource

        single = MixtureItem(name=task.name or "", config=task.config)
        return ReasoningGymSource(
            task.mixture or (single,),
            size=task.size,
            eval_size=eval_size,
            renderer=renderer,
            seed=seed,
        )
    rows, name = _rows(task)
    return RowSource(rows, name=name, renderer=renderer, eval_size=eval_size, seed=seed)


def make_examples(
    task: TaskConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    eval_size: int,
    stop_token_ids: tuple[int, ...],
    max_tokens: int,
) -> ExampleSource:
    """The examples of a task with answers. Raises like `make_source`."""
    if task.kind == "reasoning_gym":
        raise ValueError(
            "task.kind: reasoning_gym has problems, and no answers to learn from; use jsonl, "
            "parquet or hf"
        )
    renderer = ExampleRenderer(
        prompts=_renderer(task, tokenizer), stop_token_ids=stop_token_ids, max_tokens=max_tokens
    )
    rows, name = _rows(task)
    examples = [renderer.example(f"{name}/{i}", row) for i, row in enumerate(rows)]
    return ExampleSource(examples, name=name, eval_size=eval_size, seed=seed)


def _renderer(task: TaskConfig, tokenizer: Tokenizer) -> Renderer:
    return Renderer(
        tokenizer=tokenizer,
        prompt_template=task.prompt_template,
        system_prompt=task.system_prompt,
        answer_field="answer" if task.kind == "reasoning_gym" else task.answer_field,
        max_prompt_tokens=task.max_prompt_tokens,
    )


def _rows(task: JsonlTask | ParquetTask | HfTask) -> tuple[Rows, str]:
    """The rows of a task's data, and what they are called."""
    match task.kind:
        case "jsonl":
            return read_jsonl(Path(task.path)), Path(task.path).stem
        case "parquet":
            return read_parquet(Path(task.path)), Path(task.path).stem
        case "hf":
            return read_hf(task.path, task.name, task.split), f"{task.path}/{task.split}"
