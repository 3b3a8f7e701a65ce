"""Where the time of a training pass goes: stamps around the parts of the code.

A part's seconds leave out the parts that run inside it, so that all of them add up to the total.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorelei.algo import clip
from lorelei.lora import linear
from lorelei.model import attention, head, mlp, norm, rope
from lorelei.model.backend import Weight
from lorelei.model.decoder import Decoder

ATTENTION_PROJECTIONS = "attention: projections"
ATTENTION_TOKENS = "attention: tokens with tokens"
ATTENTION_ROTATION = "attention: rotation"
MLP_PROJECTIONS = "MLP: projections"
MLP_GATE = "MLP: gate"
ADAPTERS = "adapters"
HEAD = "logits and loss"
NORMS = "rest: norms"
REST = "rest: everything else"


class PartClock:
    """Seconds by part, from the first stamp to `stop`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._part, self._since = REST, time.perf_counter()

    def start(self) -> None:
        self._seconds = {}
        self._part, self._since = REST, time.perf_counter()

    def stop(self) -> dict[str, float]:
        self._switch(REST)
        return self._seconds

    def _switch(self, part: str) -> str:
        now, before = time.perf_counter(), self._part
        self._seconds[before] = self._seconds.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def stamp(self, owner: Any, name: str, part: str | Callable[..., str]) -> None:
        """Count a function of a class or module to a part, or to what `part(*arguments)` says."""
        plain = vars(owner)[name]
        function = plain.__func__ if isinstance(plain, staticmethod) else plain

        def stamped(*args: Any, **kwargs: Any) -> Any:
            with self.part(part if isinstance(part, str) else part(*args)):
                return function(*args, **kwargs)

        setattr(owner, name, staticmethod(stamped) if function is not plain else stamped)

    def stamp_training(self, model: Decoder) -> None:
        """Put stamps on everything that a pass with `model` runs through."""
        parts = {id(model.head.weight): HEAD}
        for layer in model.layers:
            assert isinstance(layer.mlp, mlp.Mlp), "the benchmarks' model has no experts"
            for one in (layer.qkv, layer.out):
                parts[id(one.weight)] = ATTENTION_PROJECTIONS
            for one in (layer.mlp.gate_up, layer.mlp.down):
                parts[id(one.weight)] = MLP_PROJECTIONS
        for name in ("product", "transposed_product"):
            self.stamp(Weight, name, lambda weight, *_: parts[id(weight)])
        for name in ("forward", "backward"):
            self.stamp(linear._LoraLinear, name, ADAPTERS)
            self.stamp(attention._TreeAttention, name, ATTENTION_TOKENS)
            self.stamp(rope._SplitRotated, name, ATTENTION_ROTATION)
            self.stamp(head._TargetLogprobs, name, HEAD)
        for name in ("__call__", "backward"):
            self.stamp(mlp.SwiGlu, name, MLP_GATE)
            self.stamp(norm.RmsNorm, name, NORMS)
        self.stamp(clip, "loss", HEAD)
