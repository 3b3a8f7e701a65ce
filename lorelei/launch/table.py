"""The plan as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorelei.launch.memory import PROMPT_SHARE
from lorelei.launch.plan import AdapterPlan, Plan

_GIB = 1024**3


def plan_table(plan: Plan) -> Group:
    """Model, adapters and memory, one under the other."""
    lines: list[Table | Text] = [
        Text(f"run {plan.run}: {plan.model} ({plan.architecture}, {plan.dtype})"),
        _parameters(plan.parameters, plan.total_parameters),
        _adapters(plan.adapters),
        *(Text(f"{a.name}: {_summary(a.modules)}") for a in plan.adapters),
        _memory(plan.memory, plan.device),
        Text(
            f"memory: {plan.total_memory / _GIB:.2f} GiB, estimated, with completions of full "
            f"length and prompts of {PROMPT_SHARE:.0%} of task.max_prompt_tokens"
        ),
        *(Text(f"warning: {line}") for line in plan.warnings),
    ]
    return Group(*lines)


def _parameters(parts: Mapping[str, int], total: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("parameters", footer="total")
    table.add_column(footer=f"{total:,}", justify="right")
    for name, count in parts.items():
        table.add_row(Text(name), Text(f"{count:,}"))
    return table


def _memory(phases: Mapping[str, Mapping[str, int]], device: str) -> Table:
    """GiB by part and phase."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column(f"GiB, {device}", footer="total")
    for phase, parts in phases.items():
        footer = f"{sum(parts.values()) / _GIB:.2f}"
        table.add_column(phase, footer=footer, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for parts in phases.values() for name in parts):
        held = (parts.get(name, 0) for parts in phases.values())
        table.add_row(Text(name), *(Text(f"{x / _GIB:.2f}" if x else "") for x in held))
    return table


def _adapters(adapters: Sequence[AdapterPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("adapter", "task", "reward", "algo"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "rollouts", "rank", "trained"):  # rollouts of one step
        table.add_column(name, justify="right", no_wrap=True)
    for a in adapters:
        rank = f"{a.rank}" if a.rank else "full"
        numbers = (f"{a.steps}", f"{a.rollouts_per_step}", rank, f"{a.parameters:,}")
        table.add_row(*map(Text, (a.name, a.task, a.reward, a.algo, *numbers)))
    return table


def _summary(modules: Sequence[str]) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in modules)
    counted = ", ".join(f"{leaf} x {count}" for leaf, count in leaves.items())
    return f"{len(modules)} modules: {counted}"
