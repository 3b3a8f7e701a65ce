"""The prompt source of a task's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorelei.config.task import MixtureItem, TaskConfig
from lorelei.data.contract import PromptSource
from lorelei.data.reader import read_hf, read_jsonl, read_parquet
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
    renderer = Renderer(
        tokenizer=tokenizer,
        prompt_template=task.prompt_template,
        system_prompt=task.system_prompt,
        answer_field="answer" if task.kind == "reasoning_gym" else task.answer_field,
        max_prompt_tokens=task.max_prompt_tokens,
    )
    match task.kind:
        case "reasoning_gym":
            from lorelei.data.reasoning_gym import ReasoningGymSource

            single = MixtureItem(name=task.name or "", config=task.config)
            return ReasoningGymSource(
                task.mixture or (single,),
                size=task.size,
                eval_size=eval_size,
                renderer=renderer,
                seed=seed,
            )
        case "jsonl":
            rows, name = read_jsonl(Path(task.path)), Path(task.path).stem
        case "parquet":
            rows, name = read_parquet(Path(task.path)), Path(task.path).stem
        case "hf":
            rows, name = read_hf(task.path, task.name, task.split), f"{task.path}/{task.split}"
    return RowSource(rows, name=name, renderer=renderer, eval_size=eval_size, seed=seed)
