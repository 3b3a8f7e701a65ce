"""The plan as a table for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lorelei.plan.memory import GIB, PROMPT_SHARE, ProcessGroup
from lorelei.plan.plan import AdapterPlan, Plan
from lorelei.plan.processes import held_by_place


def plan_table(plan: Plan) -> Group:
    """Model, adapters and memory, one under the other."""
    lines: list[Table | Text] = [
        Text(f"run {plan.run}: {plan.model} ({plan.architecture}, {plan.dtype})"),
        _parameters(plan.parameters, plan.total_parameters),
        _adapters(plan.adapters),
        *(Text(f"{a.name}: {_summary(a.modules)}") for a in plan.adapters),
        *(Text(f"{a.name}: {a.algo} is {a.expands}") for a in plan.adapters if a.expands),
        *([_memory(plan.memory, plan.device)] if plan.memory else []),
        *(_processes(plan) if _spread(plan) else []),
        Text(_estimate(plan)),
        *([Text(_verdict(plan))] if plan.device_memory and not plan.problems else []),
        *(Text(f"does not fit: {line}") for line in plan.problems),
        *(Text(f"warning: {line}") for line in plan.warnings),
    ]
    return Group(*lines)


def _spread(plan: Plan) -> bool:
    """Whether there is more than the controller with a trainer in it."""
    return len(plan.processes) > 2 or not plan.memory


def _estimate(plan: Plan) -> str:
    what = "memory" if plan.memory else "largest process"
    words = (
        f"{what}: {plan.total_memory / GIB:.2f} GiB, estimated, with completions of full length "
        f"and prompts of {PROMPT_SHARE:.0%} of task.max_prompt_tokens"
    )
    if plan.device == "accelerator":
        words += "; the driver's context, buffers of collectives and fragmentation come on top"
    return words


def _verdict(plan: Plan) -> str:
    assert plan.device_memory is not None
    held, limit = held_by_place(plan.processes), f"{plan.device_memory / GIB:.1f} GiB"
    if plan.device == "cpu":
        most = plan.total_memory if plan.memory else held["cpu"]
        return f"fits: {most / GIB:.1f} of {limit} of this machine"
    most = max(bytes for place, bytes in held.items() if "gpu" in place)
    return f"fits: at most {most / GIB:.1f} of {limit} of a device"


def _processes(plan: Plan) -> list[Table | Text]:
    """Where each process is, then what it holds and why."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("process", no_wrap=True)
    table.add_column("where", overflow="fold")
    for name in ("GiB each", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in plan.processes:
        count = f" x {len(group.places)}" if len(group.places) > 1 else ""
        on_device = any("gpu" in place for place in group.places)
        limit = plan.device_memory if on_device else None
        table.add_row(
            Text(f"{group.role}{count}"),
            Text(_places(group.places)),
            Text(f"{group.bytes / GIB:.1f}" if group.parts else ""),
            Text(f"{limit / GIB:.1f}" if limit else ""),
        )
    return [table, *(_arithmetic(group) for group in plan.processes if group.parts)]


def _arithmetic(group: ProcessGroup) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column(group.role, footer="total", no_wrap=True)
    table.add_column("GiB", footer=f"{group.bytes / GIB:.2f}", justify="right", no_wrap=True)
    table.add_column("how", footer=group.note, overflow="fold")
    for part in group.parts:
        table.add_row(Text(part.name), Text(f"{part.bytes / GIB:.2f}"), Text(part.how))
    return table


def _places(places: Sequence[str]) -> str:
    """'gpu 0 to 3' for neighbours, else all of them."""
    seen = list(dict.fromkeys(places))
    heads = [place.rpartition(" ")[0] for place in seen]
    tails = [place.rpartition(" ")[2] for place in seen]
    numbers = [int(tail) for tail in tails if tail.isdigit()]
    neighbours = list(range(numbers[0], numbers[0] + len(seen))) if numbers else []
    if len(seen) > 1 and len(set(heads)) == 1 and numbers == neighbours:
        return f"{seen[0]} to {numbers[-1]}"
    return ", ".join(seen)


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
        footer = f"{sum(parts.values()) / GIB:.2f}"
        table.add_column(phase, footer=footer, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for parts in phases.values() for name in parts):
        held = (parts.get(name, 0) for parts in phases.values())
        table.add_row(Text(name), *(Text(f"{x / GIB:.2f}" if x else "") for x in held))
    return table


def _adapters(adapters: Sequence[AdapterPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("adapter", "task", "reward", "algo"):
        table.add_column(name, overflow="fold")
    of_a_step = "/".join(sorted({"rollouts" if a.samples else "rows" for a in adapters}))
    for name in ("steps", of_a_step, "rank", "trained"):
        table.add_column(name, justify="right", no_wrap=True)
    for a in adapters:
        rank = f"{a.rank}" if a.rank else "full"
        numbers = (f"{a.steps}", f"{a.sequences_per_step}", rank, f"{a.parameters:,}")
        table.add_row(*map(Text, (a.name, a.task, a.reward or "", a.algo, *numbers)))
    return table


def _summary(modules: Sequence[str]) -> str:
    leaves = Counter(name.rpartition(".")[2] for name in modules)
    counted = ", ".join(f"{leaf} x {count}" for leaf, count in leaves.items())
    return f"{len(modules)} modules: {counted}"
