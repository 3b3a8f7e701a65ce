"""An AReaL file as a configuration of ours: the table applied, and what needs more than a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lorelei.areal.backends import (
    allocation,
    rollout_section,
    train_backend,
    train_section,
    unused,
)
from lorelei.areal.contradictions import check
from lorelei.areal.data import IMAGES, data_sections, own_sections
from lorelei.areal.file import ArealFile
from lorelei.areal.objectives import algorithm
from lorelei.areal.rules import RULES
from lorelei.config.errors import ConfigError
from lorelei.config.section import Raw, is_mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """An AReaL file translated to our schema."""

    file: ArealFile
    config: Raw
    missing: Mapping[str, str]  # {our key: why the file does not give it, and what does}


def translate(data: Raw, kind: object = None) -> Translation:
    """Of a file without interpolations. Raises ConfigError for what cannot be meant or done.

    kind: of an algorithm in the place of the file's; what that lacks is left out. None: its own.
    """
    file = ArealFile(data)
    check(file)
    config: Raw = {"name": _name(file), "algo": {}}
    _copy(file, config)
    if "model" not in config:
        raise ConfigError("actor.path: is required, such as Qwen/Qwen2.5-1.5B-Instruct")
    if file.value("cluster.n_gpus_per_node"):
        config["machine"]["devices"] = file.number("cluster.n_gpus_per_node")
    config["train"] = train_section(train_backend(file), "actor.backend") | config.get("train", {})
    _schedule(file, config["optimizer"])
    if file.sft:
        config["algo"]["kind"] = "sft"
    else:
        config.setdefault("rollout", {})
        config["rollout"] |= rollout_section(file, allocation(file).rollout)
        config["adapters"] = {_plain(str(file.value("gconfig.lora_name", "default_lora"))): {}}
        config["algo"] = algorithm(file, config["algo"], kind)
    missing: dict[str, str] = {}
    data_sections(file, config, missing)
    own_sections(file, missing)
    return Translation(file=file, config=config, missing=missing)


def require(translation: Translation, config: Raw) -> None:
    """Raises ConfigError for what the file does not give and no override gave.

    config: the translation with the overrides.
    """
    if IMAGES in translation.missing and "task" not in config:
        raise ConfigError(translation.missing[IMAGES])
    _refuse_full_fine_tuning(translation, config)
    for key, reason in translation.missing.items():
        if key not in config and key != IMAGES:
            raise ConfigError(f"{key}: {reason}")


def _refuse_full_fine_tuning(translation: Translation, config: Raw) -> None:
    """Where it cannot run as the file has it: a wider type, and no server, are needed here."""
    lora, sft = config.get("lora"), translation.file.sft
    if not is_mapping(lora) or lora.get("use_lora", True):
        return
    train, rollout = config.get("train"), config.get("rollout")
    trains = train.get("kind") if is_mapping(train) else None
    samples = rollout.get("kind", "embedded") if is_mapping(rollout) else "embedded"
    if config.get("dtype") == "float32" and trains != "megatron" and samples == "embedded":
        return
    to_lora = ["actor.use_lora=true"] if sft else ["actor.use_lora=true", "rollout.use_lora=true"]
    to_full = ["actor.dtype=float32"]
    if not sft:
        to_full += ["rollout={kind: embedded}", "publish.kind=memory"]
    if trains == "megatron":
        to_lora.append("actor.megatron.bridge_type=megatron-bridge")
        to_full.append("actor.backend=fsdp:d1")
    raise ConfigError(
        "actor.use_lora: false (AReaL's default) is full fine-tuning, which runs here in float32 "
        f"with archon or fsdp{'' if sft else ' and the embedded sampler'} only; for LoRA give "
        f"`{' '.join(to_lora)}`, for all weights `{' '.join(to_full)}`"
    )


def _copy(file: ArealFile, config: Raw) -> None:
    left_out = tuple(f"{section}." for section in unused(file))
    for rule in RULES:
        value = file.value(rule.key, rule.default)
        if rule.how != "copied" or value is None or rule.key.startswith(left_out):
            continue
        (ours,) = rule.ours
        if file.sft and ours.startswith(("algo.", "publish.")) and ours != "algo.batch_size":
            continue
        put(config, ours, rule.convert(value) if rule.convert else value)
    if not file.sft and file.has_section("eval_gconfig"):
        greedy = file.value("eval_gconfig.greedy", False)
        warm = file.number("eval_gconfig.temperature", 1.0)
        put(config, "eval.temperature", 0.0 if greedy else warm)


def _schedule(file: ArealFile, optimizer: Raw) -> None:
    ratio = file.number("actor.optimizer.min_lr_ratio", 0.0)
    if ratio and optimizer["lr_schedule"] != "constant":  # AReaL does nothing with it then
        optimizer["min_lr_ratio"] = ratio


def put(config: Raw, dotted: str, value: object) -> None:
    """Set a dotted key of nested mappings."""
    *above, last = dotted.split(".")
    for key in above:
        below = config.setdefault(key, {})
        assert is_mapping(below), f"{dotted}: {key} is a value"
        config = below
    config[last] = value


def _name(file: ArealFile) -> str:
    """Of the run, from that of experiment and trial."""
    given = (file.value("experiment_name"), file.value("trial_name"))
    return _plain("-".join(str(name) for name in given if name)) or "run"


def _plain(name: str) -> str:
    """A name as runs and adapters may have it."""
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:64]
