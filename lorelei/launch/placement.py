"""Which process of a run is where: known from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from lorelei.config.run import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, or one that shares its work with others of its kind."""

    name: str
    where: Literal["here", "ray", "attached"]
    node: str  # for people
    device: Literal["cpu", "accelerator"]  # the kind that it computes on, if there is one
    number: int | None  # of the accelerator on its node; none: not known before, or a CPU


def processes(config: RunConfig, accelerated: bool = True) -> tuple[Process, ...]:
    """Every process that loads weights or drives the run, controller first.

    accelerated: whether the machines have accelerators.
    """
    device = "accelerator" if accelerated else "cpu"
    rollout, workers = config.rollout, config.train.workers
    remote = config.cluster.kind == "ray"
    inside = [] if remote or workers > 1 else [config.train.kind]
    inside += ["embedded"] if rollout.kind == "embedded" else []
    found = [
        Process(
            name="controller" + (f" with {' and '.join(inside)}" if inside else ""),
            where="here",
            node="this machine",
            device=device if inside else "cpu",
            number=0 if inside and accelerated else None,
        )
    ]
    if not inside or inside == ["embedded"]:
        found += _group([f"{config.train.kind} rank {n}" for n in range(workers)], config, device)
    if rollout.kind == "embedded":
        return tuple(found)
    if rollout.urls:
        found += [
            Process(
                name=f"{rollout.kind} server {number}",
                where="attached",
                node=urlsplit(url).hostname or url,
                device=device,
                number=None,
            )
            for number, url in enumerate(rollout.urls)
        ]
        return tuple(found)
    names = [f"{rollout.kind} server {number}" for number in range(rollout.replicas)]
    found += _group(names, config, device, rollout.tensor_parallel_size)
    return tuple(found)


def _group(names: list[str], config: RunConfig, device: str, parts: int = 1) -> list[Process]:
    """parts: processes of each, with a device of its own each."""
    found: list[Process] = []
    for number, name in enumerate(names):
        for part in range(parts):
            remote = config.cluster.kind == "ray"
            counted = device == "accelerator" and not remote
            found.append(
                Process(
                    name=f"{name} part {part}" if parts > 1 else name,
                    where="ray" if remote else "here",
                    node=_ray_node(config) if remote else "this machine",
                    device="accelerator" if device == "accelerator" else "cpu",
                    number=number * parts + part if counted else None,
                )
            )
    return found


def _ray_node(config: RunConfig) -> str:
    assert config.cluster.kind == "ray"
    match config.cluster.spread:
        case "pack":
            return "a Ray node, few of them"
        case "spread":
            return "a Ray node, many of them"
        case "strict":
            return "a Ray node of its own"
