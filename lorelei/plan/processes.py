"""Which process of a run is where, and what it holds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorelei.config.rollout import ServerRollout
from lorelei.lora.targets import Shape
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


def process_groups(
    run: Footprint,
    counts: Counts,
    shapes: Mapping[str, Shape],
    modules: set[str],
    hardware: Hardware,
    phases: Mapping[str, Parts],
) -> tuple[tuple[ProcessGroup, ...], tuple[str, ...]]:
    """(the processes, what does not fit). phases: of a controller that trains itself.

    Raises ConfigError when there are fewer devices than processes.
    """
    rollout, train = run.config.rollout, run.config.train
    on_ray = ", on Ray" if run.config.cluster.kind == "ray" else ""
    inside = trains_here(run.config)
    servers = rollout if isinstance(rollout, ServerRollout) and not rollout.urls else None
    ranks = 1 if inside else train.workers
    sampler = rollout.kind == "embedded" and not inside
    groups = [ranks, *([1] if sampler else [])]
    if servers is not None:
        groups += [servers.tensor_parallel_size] * servers.replicas
    seats = seat(hardware, groups)
    role = f"{train.kind} rank{on_ray}"
    found = [_controller(run)]
    problems: list[str] = []
    if inside:
        largest = max(phases, key=lambda name: sum(phases[name].values()))
        parts = [
            MemoryItem(name=name, bytes=held, how=f"while {largest}")
            for name, held in phases[largest].items()
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
    return tuple(found), (*problems, *_too_large(found, hardware))


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


def _too_large(groups: Sequence[ProcessGroup], hardware: Hardware) -> list[str]:
    """Devices whose processes hold more than they have."""
    if hardware.memory is None:
        return []
    held: dict[str, int] = {}
    for group in groups:
        for place in group.places:
            held[place] = held.get(place, 0) + group.bytes
    over = {
        p: n for p, n in held.items() if p.endswith(tuple("0123456789")) and n > hardware.memory
    }
    if not over:
        return []
    place, most = max(over.items(), key=lambda item: item[1])
    return [
        f"machine.memory: {place} would hold {most / GIB:.1f} GiB of {hardware.memory / GIB:.1f} "
        f"({len(over)} devices do not fit); spread train over more of them, or lower "
        "train.max_tokens_per_mb"
    ]
