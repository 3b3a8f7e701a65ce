"""The plan as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorelei.launch.plan import AdapterPlan, Plan

_GIB = 1024**3


def plan_table(plan: Plan) -> Group:
    """Model, adapters and memory, one under the other."""
    lines: list[Table | Text] = [
        Text(f"run {plan.run}: {plan.model} ({plan.architecture}, {plan.dtype})"),
        _totals("parameters", plan.parameters, plan.total_parameters, "{:,}"),
        _adapters(plan.adapters),
        *(Text(f"{a.name}: {_summary(a.modules)}") for a in plan.adapters),
        _totals("memory, estimated at its largest", _gib(plan.memory), plan.total_memory / _GIB),
        *(Text(f"warning: {line}") for line in plan.warnings),
    ]
    return Group(*lines)


def _totals(
    title: str, parts: Mapping[str, float], total: float, form: str = "{:,.2f} GiB"
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column(title, footer="total")
    table.add_column(footer=form.format(total), justify="right")
    for name, amount in parts.items():
        table.add_row(Text(name), Text(form.format(amount)))
    return table


def _adapters(adapters: Sequence[AdapterPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("adapter", "task", "reward", "algo"):
        table.add_column(name, overflow="fold")
    for name in ("steps", "rollouts", "rank", "trained"):  # rollouts of one step
        table.add_column(name, justify="right", no_wrap=True)
    for a in adapters:
        numbers = (f"{a.steps}", f"{a.rollouts_per_step}", f"{a.rank}", f"{a.parameters:,}")
        table.add_row(*map(Text, (a.name, a.task, a.reward, a.algo, *numbers)))
    return table


def _summary(modules: Sequence[str]) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in modules)
    counted = ", ".join(f"{leaf} x {count}" for leaf, count in leaves.items())
    return f"{len(modules)} modules: {counted}"


def _gib(memory: Mapping[str, int]) -> dict[str, float]:
    return {part: amount / _GIB for part, amount in memory.items()}
