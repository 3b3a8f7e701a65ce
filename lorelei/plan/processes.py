"""Which process of a run is where, and what it holds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorelei.config.errors import ConfigError
from lorelei.config.rollout import ServerRollout
from lorelei.lora.targets import Shape
from lorelei.plan.changes import changes
from lorelei.plan.hardware import Hardware, seat
from lorelei.plan.memory import (
    CONTROLLER,
    GIB,
    Footprint,
    MemoryItem,
    Parts,
    ProcessGroup,
    reward_bytes,
    sampler_parts,
)
from lorelei.plan.rank_memory import Counts, rank_parts
from lorelei.plan.server_memory import server_parts
from lorelei.train.kinds import trains_here

MOST_PROCESSES = 100_000  # a slip of the keyboard would fill the memory with their places


def process_groups(
    run: Footprint,
    counts: Counts,
    shapes: Mapping[str, Shape],
    modules: set[str],
    hardware: Hardware,
    phases: Mapping[str, Parts],
) -> tuple[tuple[ProcessGroup, ...], tuple[str, ...]]:
    """(the processes, what does not fit). phases: of a controller that trains itself.

    Raises ConfigError when there are fewer devices than processes, or more than MOST_PROCESSES.
    """
    rollout, train = run.config.rollout, run.config.train
    on_ray = ", on Ray" if run.config.cluster.kind == "ray" else ""
    inside = trains_here(run.config)
    servers = rollout if isinstance(rollout, ServerRollout) and not rollout.urls else None
    ranks = 1 if inside else train.workers
    sampler = rollout.kind == "embedded" and not inside
    groups = [ranks, *([1] if sampler else [])]
    _check_number("train", ranks)
    if servers is not None:
        _check_number("rollout.replicas", servers.replicas * servers.tensor_parallel_size)
        groups += [servers.tensor_parallel_size] * servers.replicas
    seats = seat(hardware, groups)
    role = f"{train.kind} rank{on_ray}"
    found = [_controller(run)]
    problems: list[str] = []
    if inside:
        phase = max(phases, key=lambda name: sum(phases[name].values()))
        parts = [
            MemoryItem(name=name, bytes=held, how=f"while {phase}")
            for name, held in phases[phase].items()
            if name not in ("programs", "reward workers")
        ]
        role = "trainer" + (" and sampler" if rollout.kind == "embedded" else "")
        found.append(_group(f"{role}, in the controller", seats[0], parts))
    else:
        found.append(_group(role, seats[0], rank_parts(run, counts)))
    if sampler:
        held = sampler_parts(run).items()
        parts = [MemoryItem(name=k, bytes=v, how="while sampling") for k, v in held]
        found.append(_group("sampler, in the controller", seats[1], parts))
    if servers is not None:
        parts, problem = server_parts(run, servers, shapes, modules, hardware)
        problems += [problem] if problem else []
        places = [place for taken in seats[1 + sampler :] for place in taken]
        size = servers.tensor_parallel_size
        words = f"{servers.replicas} x {size} process{'es' * (size > 1)}"
        found.append(_group(f"{servers.kind} server{on_ray}", places, parts, words))
    elif isinstance(rollout, ServerRollout):
        found.append(_group(f"{rollout.kind} server", rollout.urls, (), "runs already"))
    return tuple(found), (*problems, *_too_large(run, found, hardware, phases))


def _check_number(field: str, processes: int) -> None:
    if processes > MOST_PROCESSES:
        raise ConfigError(
            f"{field}: {processes} processes are more than the {MOST_PROCESSES} that one run may "
            "have; lower its sizes"
        )


def _controller(run: Footprint) -> ProcessGroup:
    """What is on the CPU in any case, beside what the controller does itself."""
    experiments = run.config.experiments()
    workers = sum(map(reward_bytes, experiments))
    count = sum(e.reward.workers for e in experiments if e.reward)
    parts = (
        MemoryItem(
            name="programs", bytes=CONTROLLER, how="Python, torch and the tokenizer, measured"
        ),
        MemoryItem(name="reward workers", bytes=workers, how=f"{count} processes, measured"),
    )
    return _group("controller", ("cpu",), parts, "the loop, rollouts and rewards")


def _group(
    role: str, places: Sequence[str], parts: Sequence[MemoryItem], note: str = ""
) -> ProcessGroup:
    return ProcessGroup(role=role, places=tuple(places), parts=tuple(parts), note=note)


def held_by_place(groups: Sequence[ProcessGroup]) -> dict[str, int]:
    """Bytes of all processes of each place."""
    held: dict[str, int] = {}
    for group in groups:
        for place in group.places:
            held[place] = held.get(place, 0) + group.bytes
    return held


def _too_large(
    run: Footprint,
    groups: Sequence[ProcessGroup],
    hardware: Hardware,
    phases: Mapping[str, Parts],
) -> list[str]:
    """Places whose processes hold more than they have."""
    if hardware.memory is None:
        return []
    if hardware.on_cpu and phases:
        return _too_large_phase(run, hardware.memory, phases)
    held = held_by_place(groups)
    places = ["cpu"] if hardware.on_cpu else [p for p in held if p[-1].isdigit()]
    over = [place for place in places if held.get(place, 0) > hardware.memory]
    if not over:
        return []
    place = max(over, key=lambda name: held[name])
    parts = {
        f"{group.role} {part.name}": replace(part, bytes=part.bytes * group.places.count(place))
        for group in groups
        for part in group.parts
    }
    where = "this machine" if hardware.on_cpu else f"machine.memory: {place}"
    count = f" ({len(over)} devices do not fit)" if len(over) > 1 else ""
    change = changes(run, list(parts.values()), held[place] - hardware.memory)
    return [_would_hold(where, held[place], hardware.memory, f"{count}; {change}")]


def _too_large_phase(run: Footprint, memory: int, phases: Mapping[str, Parts]) -> list[str]:
    """Of a run whose processes share the CPUs' memory."""
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    held = sum(phases[phase].values())
    if held <= memory:
        return []
    parts = [MemoryItem(name=name, bytes=size, how="") for name, size in phases[phase].items()]
    change = changes(run, parts, held - memory)
    return [_would_hold("this machine", held, memory, f" while {phase}; {change}")]


def _would_hold(where: str, held: int, memory: int, more: str) -> str:
    return f"{where} would hold {held / GIB:.1f} GiB of {memory / GIB:.1f}{more}"
