"""What cannot be meant in an AReaL file, and what cannot be done here."""

from __future__ import annotations

import json
from typing import Any

from lorelei.areal.backends import allocation, unused
from lorelei.areal.file import ArealFile, rule_of
from lorelei.areal.rule import Rule
from lorelei.areal.rules import DTYPES
from lorelei.config.errors import ConfigError, shown
from lorelei.config.parallel import Backend

# what AReaL takes where the file says nothing, of keys that must agree with another
DEFAULTS = {
    "rollout.use_lora": False,
    "actor.use_lora": False,
    "gconfig.temperature": 1.0,
    "gconfig.n_samples": 1,
    "actor.reward_norm.group_size": 1,
    "actor.adv_norm.group_size": 1,
}
NORMS = ("actor.reward_norm", "actor.adv_norm")
KINDS = ("rl", "sft")
OBJECTIVES = {"dpo": "DPO", "rw": "a reward model"}


def check(file: ArealFile) -> None:
    """Raises ConfigError with field, value and fix."""
    if not file.has_section("actor"):
        raise ConfigError("actor: is required; a file without it samples, and trains nothing")
    # what is trained comes first: nothing else of the file matters then
    if (kind := file.value("train_dataset.type", "rl")) not in KINDS:
        raise ConfigError(
            f"train_dataset.type: {shown(kind)} is {OBJECTIVES.get(kind, 'another objective')}, "
            "which is not built yet (allowed: rl, sft)"
        )
    for key in file.values:
        rule = rule_of(key)
        if rule is not None and rule.objective:
            _check_only(file, key, rule)
    left_out = tuple(f"{section}." for section in unused(file))
    for key in file.values:
        rule = rule_of(key)
        if rule is None or key.startswith(left_out):
            continue
        if rule.how == "only":
            _check_only(file, key, rule)
        elif rule.how == "equal":
            _check_equal(file, key, rule.equal_to, rule.why)
    if not file.sft:
        _check_sampling(file)
    if (scheduler := file.value("scheduler.type", "local")) not in ("local", "ray"):
        raise ConfigError(
            f"scheduler.type: {scheduler!r} does not start runs here; set it to null, and for a "
            "Slurm job use `lorelei launch slurm FILE`"
        )


def _check_sampling(file: ArealFile) -> None:
    parts = allocation(file)
    _check_equal(file, "rollout.use_lora", "actor.use_lora", "else rollouts sample the base model")
    for norm in NORMS:
        if file.has_section(norm):
            key = f"{norm}.group_size"
            _check_equal(file, key, "gconfig.n_samples", "a group is of one prompt")
    _check_servers(file, parts.rollout.kind)
    _check_bridge(file, parts.train)
    _check_devices(file, parts.train, parts.rollout)
    if (weight := file.number("actor.kl_ctl", 0.1)) > 0 and not file.has_section("ref"):
        raise ConfigError(
            f"actor.kl_ctl: {weight} without a section `ref` rewards unlikely tokens in AReaL, and "
            "not those that are near a reference; give ref={path: ${actor.path}}, or set it to 0"
        )


def _check_only(file: ArealFile, key: str, rule: Rule) -> None:
    value = file.values[key]
    if value is None or value in rule.allowed:
        return
    if rule.objective:
        section = key.partition(".")[0] if rule.key.endswith(".*") else key
        fix = _yaml(rule.allowed[0])
        raise ConfigError(
            f"{key}: {_yaml(value)} is {rule.objective}, which is not built yet; "
            f"{section}={fix} trains without it"
        )
    allowed = ", ".join(_yaml(a) for a in rule.allowed) or "nothing"
    raise ConfigError(f"{key}: {_yaml(value)} cannot be done here; {rule.why} (allowed: {allowed})")


def _check_equal(file: ArealFile, key: str, other: str, why: str) -> None:
    here, there = (file.value(k, DEFAULTS.get(k)) for k in (key, other))
    if key.startswith(NORMS) and "group" not in _levels(file, key.rpartition(".")[0]):
        return  # its size means nothing
    if key.endswith("dtype"):
        here, there = DTYPES.get(here, here), DTYPES.get(there, there)
    if here is None or there is None or here == there:
        return
    raise ConfigError(
        f"{key}: {_yaml(file.value(key, DEFAULTS.get(key)))} contradicts {other}: "
        f"{_yaml(file.value(other, DEFAULTS.get(other)))}; {why}: make them equal, such as "
        f"{key}: ${{{other}}}"
    )


def _levels(file: ArealFile, norm: str) -> set[Any]:
    return {file.value(f"{norm}.mean_level", "batch"), file.value(f"{norm}.std_level", "batch")}


def _check_servers(file: ArealFile, kind: str) -> None:
    rank = file.number("actor.lora_rank", 32)
    key = f"{kind}.max_lora_rank"
    if file.value("actor.use_lora") and rank > file.number(key, rank):
        raise ConfigError(
            f"{key}: {file.value(key)} is below actor.lora_rank: {rank}, whose adapters the server "
            "would refuse; set it to ${actor.lora_rank}"
        )
    versions = file.number("rollout.max_head_offpolicyness", 0) + 2
    key = {"sglang": "sglang.max_loaded_loras", "vllm": "vllm.max_loras"}[kind]
    if file.number(key, versions) < versions:
        raise ConfigError(
            f"{key}: {file.value(key)} has no room for the {versions} versions of "
            f"rollout.max_head_offpolicyness: {versions - 2}; use {versions} or more"
        )


def _check_bridge(file: ArealFile, train: Backend) -> None:
    bridge = file.value("actor.megatron.bridge_type", "mbridge")
    if train.kind == "megatron" and file.value("actor.use_lora") and bridge != "megatron-bridge":
        raise ConfigError(
            f"actor.megatron.bridge_type: {bridge!r} (AReaL's default is mbridge) cannot train "
            "LoRA; use megatron-bridge"
        )


def _check_devices(file: ArealFile, train: Backend, rollout: Backend) -> None:
    nodes, devices = (file.number(f"cluster.{key}") for key in ("n_nodes", "n_gpus_per_node"))
    if nodes is None or not devices:  # 0: on CPUs
        return
    taken = train.sizes.world + rollout.sizes.world
    if taken > nodes * devices:
        raise ConfigError(
            f"cluster.n_gpus_per_node: {devices} on {nodes} node{'s' * (nodes > 1)} are fewer than "
            f"the {train.sizes.world} of actor.backend and {rollout.sizes.world} of "
            "rollout.backend; raise it, or lower a backend's d"
        )


def _yaml(value: object) -> str:
    try:
        text = json.dumps(value)
    except TypeError:
        text = shown(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
