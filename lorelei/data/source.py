"""The prompts, or the examples, of a task's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorelei.algo.sft import Sft
from lorelei.config.task import ANSWER, HfTask, JsonlTask, MixtureItem, ParquetTask, TaskConfig
from lorelei.data.contract import PromptSource
from lorelei.data.examples import ExampleRenderer, ExampleSource
from lorelei.data.pairs import ComparisonRenderer, ComparisonSource
from lorelei.data.reader import Table, read_hf, read_jsonl, read_parquet
from lorelei.data.renderer import Renderer
from lorelei.data.rows import RowSource, Unfit, usable

if TYPE_CHECKING:
    from lorelei.model.tokenizer import Tokenizer


def make_source(
    task: TaskConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    eval_size: int,
    needs_answer: bool = True,
    own_tools: bool = True,
) -> PromptSource:
    """The prompts of a task, of which `eval_size` are held out.

    needs_answer: whether the reward reads the answer. own_tools: whether rows may bring tools.
    Files are read and rendered whole. Raises ValueError for data that cannot be used.
    """
    renderer = _renderer(task, tokenizer, needs_answer=needs_answer, own_tools=own_tools)
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
    return RowSource(
        _table(task), renderer=renderer, eval_size=eval_size, seed=seed, unfit=_unfit(task)
    )


def make_examples(
    task: TaskConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    eval_size: int,
    stop_token_ids: tuple[int, ...],
    max_tokens: int,
    algo: Sft | None = None,
) -> ExampleSource:
    """The examples of a task with answers. Raises like `make_source`.

    algo: what of the rows is learnt; None: the answers.
    """
    renderer = ExampleRenderer(
        prompts=_renderer(task, tokenizer),
        stop_token_ids=stop_token_ids,
        max_tokens=max_tokens,
        all_turns=algo is not None and algo.loss_on == "assistant_turns",
        weight_field=algo.weight_field if algo is not None else None,
    )
    rows = _dataset(task)
    table = _table(rows)
    examples, notes = usable(table, renderer.example, _unfit(rows))
    return ExampleSource(examples, name=table.name, eval_size=eval_size, seed=seed, notes=notes)


def make_comparisons(
    task: TaskConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    eval_size: int,
    stop_token_ids: tuple[int, ...],
    max_tokens: int,
    paired: bool,
) -> ComparisonSource:
    """The comparisons of a task with preferences. Raises like `make_source`."""
    examples = ExampleRenderer(
        prompts=_renderer(task, tokenizer), stop_token_ids=stop_token_ids, max_tokens=max_tokens
    )
    renderer = ComparisonRenderer(examples=examples, paired=paired)
    rows = _dataset(task)
    table = _table(rows)
    pairs, notes = usable(table, renderer.comparison, _unfit(rows))
    return ComparisonSource(
        pairs,
        name=table.name,
        eval_size=eval_size,
        seed=seed,
        max_tokens=max_tokens,
        notes=notes,
    )


def _renderer(
    task: TaskConfig, tokenizer: Tokenizer, *, needs_answer: bool = True, own_tools: bool = True
) -> Renderer:
    return Renderer(
        tokenizer=tokenizer,
        prompt_template=task.prompt_template,
        system_prompt=task.system_prompt,
        answer_field=ANSWER if task.kind == "reasoning_gym" else task.answer_field,
        max_prompt_tokens=task.max_prompt_tokens,
        variables=task.chat_template_kwargs,
        control_tokens=task.control_tokens,
        # a generated problem may have several right answers, and then names none
        answers="needed" if needs_answer and task.kind != "reasoning_gym" else "none",
        own_tools=own_tools,
    )


def _dataset(task: TaskConfig) -> JsonlTask | ParquetTask | HfTask:
    """The task, which must have answers to learn from. Raises ValueError."""
    if task.kind == "reasoning_gym":
        raise ValueError(
            "task.kind: reasoning_gym has problems, and no answers to learn from; use jsonl, "
            "parquet or hf"
        )
    return task


def _unfit(task: JsonlTask | ParquetTask | HfTask) -> Unfit:
    return Unfit(long=task.long_prompts, null=task.null_rows)


def _table(task: JsonlTask | ParquetTask | HfTask) -> Table:
    """The rows of a task's data."""
    match task.kind:
        case "jsonl":
            return read_jsonl(Path(task.path))
        case "parquet":
            return read_parquet(Path(task.path))
        case "hf":
            return read_hf(task.path, task.name, task.split)
