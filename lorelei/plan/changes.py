"""What to change so that a run that does not fit would. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from lorelei.plan.memory import Footprint, MemoryItem, longest_sequence

_HALVES = "set dtype: bfloat16"


def changes(run: Footprint, parts: Sequence[MemoryItem], excess: int) -> str:
    """Settings of the largest parts, of as many as hold what is too much.

    parts: what one place holds in the phase that needs most. excess: bytes over its memory.
    """
    found: dict[str, None] = {}
    for part in sorted(parts, key=lambda part: part.bytes, reverse=True):
        setting = _setting(run, part.name)
        if part.bytes and setting:
            found[setting] = None
            excess -= part.bytes // 2 if setting == _HALVES else part.bytes
        if excess < 0:
            return ", and ".join(found)
    return "it needs a machine with more memory, or a smaller model"


def _setting(run: Footprint, part: str) -> str:
    """What makes a part smaller; empty: nothing does."""
    config = run.config
    match part:
        case "base model" | "checkpoint file" | "gathered blocks" | "gathered ends":
            if config.dtype == "float32" and part == "base model" and not _full(run):
                return _HALVES
            more = "" if run.on_cpu else ", or spread train over more devices"
            return f"take a smaller model{more}"
        case "activations" | "scratch":
            if not config.train.gradient_checkpointing:
                return "set train.gradient_checkpointing: true"
            if config.train.max_tokens_per_mb > longest_sequence(run):
                return "lower train.max_tokens_per_mb"
            return "lower rollout.max_new_tokens or task.max_prompt_tokens"
        case "KV cache" | "decoding" | "working":
            return "lower rollout.max_running or rollout.max_new_tokens"
        case "adapters" | "published adapters" | "gradients" | "optimizer" | "snapshots":
            return "set lora.use_lora: true" if _full(run) else "lower lora.lora_rank"
        case "adapter slots":
            return "lower lora.lora_rank"
        case "decode copy":
            return "name fewer lora.target_modules"
        case "reward workers":
            return "lower reward.workers"
        case _:
            return ""


def _full(run: Footprint) -> bool:
    return any(e.lora.spec().full for e in run.config.experiments())
