"""Who trains and who samples, of an AReaL file."""

from __future__ import annotations

import math
from dataclasses import asdict

from lorelei.areal.file import ArealFile, rule_of
from lorelei.config.errors import ConfigError, nearest
from lorelei.config.extra_args import DERIVED
from lorelei.config.parallel import Allocation, Backend, parse_allocation, parse_backend
from lorelei.config.section import Raw

TRAIN = ("archon", "fsdp", "megatron")
ROLLOUT = ("sglang", "vllm")
VLLM_SEQUENCES = 256  # AReaL's default of vllm.max_num_seqs
EXTRA = ("rollout.extra_args",)
_CONTEXT = {"sglang": "context_length", "vllm": "max_model_len"}
_EXAMPLE = {"rollout.backend": "sglang:d4", "actor.backend": "fsdp:d4"}


def allocation(file: ArealFile) -> Allocation:
    """Of both backends, or of allocation_mode, of a file that samples. Raises ConfigError."""
    older = file.value("allocation_mode")
    named = {key: file.value(key) for key in ("rollout.backend", "actor.backend")}
    if older:
        found = parse_allocation(str(older), "allocation_mode")
        fields = ("allocation_mode", "allocation_mode")
    else:
        for key, value in named.items():
            if value is None:
                raise ConfigError(f"{key}: is required, such as {_EXAMPLE[key]}")
        found = Allocation(
            rollout=parse_backend(str(named["rollout.backend"]), "rollout.backend"),
            train=parse_backend(str(named["actor.backend"]), "actor.backend"),
            shared=False,
        )
        fields = ("rollout.backend", "actor.backend")
    _check_kind(found.rollout.kind, ROLLOUT, fields[0])
    _check_kind(found.train.kind, TRAIN, fields[1])
    if found.shared:
        raise ConfigError(
            f"allocation_mode: {older!r} puts trainer and servers on the same devices; they have "
            "devices of their own here: write + for |"
        )
    return found


def train_backend(file: ArealFile) -> Backend:
    """Who trains. Raises ConfigError."""
    if not file.sft:
        return allocation(file).train
    if (value := file.value("actor.backend")) is None:
        raise ConfigError(f"actor.backend: is required, such as {_EXAMPLE['actor.backend']}")
    found = parse_backend(str(value), "actor.backend")
    _check_kind(found.kind, TRAIN, "actor.backend")
    return found


def unused(file: ArealFile) -> tuple[str, ...]:
    """Sections that nobody reads: those of engines that were not chosen."""
    trains = train_backend(file).kind
    engines = tuple(f"actor.{kind}" for kind in TRAIN if kind != trains)
    if file.sft:
        return (*engines, *ROLLOUT, "rollout", "gconfig", "eval_gconfig")
    samples = allocation(file).rollout.kind
    return (*engines, *(kind for kind in ROLLOUT if kind != samples))


def train_section(backend: Backend, field: str) -> Raw:
    """Our `train` for a backend. Raises ConfigError for a size that the engine does not have."""
    sizes = backend.sizes
    match backend.kind:
        case "archon":
            _only_sizes(backend, field, "data")
            return {"kind": "archon", "workers": sizes.data}
        case "fsdp":
            _only_sizes(backend, field, "data", "tensor", "context")
            return {
                "kind": "fsdp",
                "data_parallel": sizes.data,
                "tensor_parallel": sizes.tensor,
                "sequence_parallel": sizes.context,
            }
        case _:
            section: Raw = {f"{name}_parallel": size for name, size in asdict(sizes).items()}
            # as AReaL sets it
            return {"kind": "megatron", **section, "sequence_parallel": sizes.tensor > 1}


def rollout_section(file: ArealFile, backend: Backend) -> Raw:
    """Our `rollout` for a backend, but for what is copied. Raises ConfigError."""
    kind, sizes = backend.kind, backend.sizes
    _only_sizes(backend, "rollout.backend", "data", "tensor")
    section: Raw = {
        "kind": kind,
        "replicas": sizes.data,
        "tensor_parallel_size": sizes.tensor,
        "max_running": _max_running(file, kind, sizes.data),
    }
    limits = (file.number("gconfig.max_tokens"), file.number(f"{kind}.{_CONTEXT[kind]}"))
    if given := [limit for limit in limits if limit is not None]:
        section["max_context"] = min(given)
    rank, asked = file.number("actor.lora_rank", 32), file.number(f"{kind}.max_lora_rank", 0)
    if asked > rank:
        section["reserve_rank"] = asked
    # AReaL waits for every group that it has room for, even with no staleness
    if not file.has("rollout.max_concurrent_rollouts"):
        section["max_concurrent"] = file.number("train_dataset.batch_size", 1)
    if extra := _extra_args(file, kind):
        section["extra_args"] = extra
    return section


def _max_running(file: ArealFile, kind: str, replicas: int) -> int:
    if kind == "vllm":
        return file.number("vllm.max_num_seqs", VLLM_SEQUENCES)
    groups = file.number(
        "rollout.max_concurrent_rollouts", file.number("train_dataset.batch_size", 1)
    )
    sequences = groups * file.number("gconfig.n_samples", 1)
    return file.number("sglang.max_running_requests", math.ceil(sequences / replicas))


def _extra_args(file: ArealFile, kind: str) -> Raw:
    """The server's own options that no rule takes, under the server's names."""
    derived = DERIVED[kind]
    found: Raw = {}
    for key, value in file.section(kind).items():
        rule = rule_of(f"{kind}.{key}")
        name = key.replace("_", "-")
        # AReaL leaves out what is null or false, and so do the servers
        if rule is None or rule.ours != EXTRA or value is None or value is False:
            continue
        if name in derived:
            raise ConfigError(
                f"{kind}.{key}: follows from {derived[name]} here; remove it from the file"
            )
        if not isinstance(value, bool | int | float | str):
            raise ConfigError(f"{kind}.{key}: {value!r} is not allowed; write one value")
        found[name] = value
    return found


def _check_kind(kind: str, allowed: tuple[str, ...], field: str) -> None:
    if kind not in allowed:
        raise ConfigError(f"{field}: {kind!r} is no engine of this side; {nearest(kind, allowed)}")


def _only_sizes(backend: Backend, field: str, *allowed: str) -> None:
    for name, value in asdict(backend.sizes).items():
        if value > 1 and name not in allowed:
            raise ConfigError(
                f"{field}: {backend.kind} has no {name} parallel size, and {value} is asked for; "
                f"use 1{', or megatron' if backend.kind in TRAIN else ''}"
            )
