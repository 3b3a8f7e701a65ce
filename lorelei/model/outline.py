"""What is known of a base model without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorelei.model.config import ModelSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Enough to plan a run, to name what it adapts and to start its servers."""

    sizes: ModelSizes
    # {name: (out, in)} of every linear layer that can get an adapter, in order of execution
    linears: Mapping[str, tuple[int, int]]
    parameters: Mapping[str, int]  # by part; a tied lm_head has none of its own
