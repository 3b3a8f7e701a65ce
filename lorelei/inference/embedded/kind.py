"""The embedded engine's description, and the sizes that its memory follows from. No torch."""

from __future__ import annotations

from lorelei.config.rollout import EmbeddedRollout
from lorelei.inference.kind import InferenceKind

PREFILL_TOKENS = 4096  # prompt tokens that one step reads (a longer prompt is read alone)
# tokens of a row's first slot, by whether whole tokens are stored (CUDA's fused attention): where
# steps are recorded (see flash_step), growing costs more than memory
FIRST_CAPACITY = {False: 32, True: 128}


def row_capacity(tokens: int, whole_tokens: bool) -> int:
    """Tokens that a row's slot has room for when it holds so many: it doubles."""
    capacity = FIRST_CAPACITY[whole_tokens]
    while capacity < tokens:
        capacity *= 2
    return capacity


KIND = InferenceKind(
    config=EmbeddedRollout,
    publishers=("memory",),
    check=lambda config, model, modules, on_cpu: None,  # it builds what the trainer builds
)
