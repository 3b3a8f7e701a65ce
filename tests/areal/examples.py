"""AReaL's examples, written from what its reference page says of them."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = (
    "gsm8k_grpo_lora",
    "gsm8k_grpo_megatron_lora",
    "gsm8k_grpo_megatron_lora_moe",
)


def example(name: str) -> Path:
    """The file of an example."""
    return Path(__file__).parent / f"{name}.yaml"
