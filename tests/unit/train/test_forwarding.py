"""Calls of the TrainEngine protocol reach what stands behind an engine, without being listed."""

from __future__ import annotations

from typing import Any

import pytest

from lorelei.train.contract import CHANGES, TrainEngine
from lorelei.train.remote.engine import RemoteEngine
from lorelei.train.remote.forwarding import CALLS, forwards
from lorelei.train.remote.restarting import Restarting
from lorelei.types import BASE, AdapterSpec

SPEC = AdapterSpec(rank=2, alpha=4)


@forwards
class Recorder:
    """Writes one call out and forwards the others."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def forward(self, method: str, args: tuple[Any, ...]) -> Any:
        self.calls.append((method, args))
        return method

    def offload(self) -> str:
        return "its own"


def test_calls_arrive_by_position_with_their_defaults() -> None:
    recorder: Any = Recorder()
    recorder.add_adapter("a", SPEC)
    recorder.add_adapter(name="b", spec=SPEC, seed=3)
    assert recorder.logprobs("batch", policy=BASE) == "logprobs"
    assert recorder.calls == [
        ("add_adapter", ("a", SPEC, 0)),
        ("add_adapter", ("b", SPEC, 3)),
        ("logprobs", ("batch", BASE)),
    ]
    assert recorder.offload() == "its own" and len(recorder.calls) == 3
    with pytest.raises(TypeError, match="unexpected keyword"):
        recorder.add_adapter("a", SPEC, colour="red")


def test_every_call_of_the_protocol_is_there() -> None:
    public = {name for name in vars(TrainEngine) if not name.startswith("_")}
    assert CALLS.keys() | {"close"} == public and CALLS.keys() > CHANGES
    for engine in (RemoteEngine, Restarting):
        assert public <= set(dir(engine))
