"""Every inference engine, by `rollout.kind`. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping

from lorelei.inference.embedded import kind as embedded
from lorelei.inference.kind import InferenceKind, ServerKind
from lorelei.inference.sglang import kind as sglang
from lorelei.inference.vllm import kind as vllm

SERVERS: Mapping[str, ServerKind] = {"vllm": vllm.KIND, "sglang": sglang.KIND}
INFERENCE: Mapping[str, InferenceKind] = {"embedded": embedded.KIND, **SERVERS}
