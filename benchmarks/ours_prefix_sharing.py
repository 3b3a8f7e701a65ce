"""Forward and backward passes of one case by archon, with its prompts shared or repeated.

usage: -m benchmarks.ours_prefix_sharing CASE shared|repeated TURNS
       -m benchmarks.ours_prefix_sharing CASE difference
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.meter import Meter
from benchmarks.prefix_sharing import CASES
from benchmarks.train_case import LOSSES, TrainCase, engine_on, model, take_gradients


def measure(case: TrainCase, shared: bool, turns: int) -> None:
    """Seconds of each pass; the first warms up and is left out."""
    engine, batch, meter = engine_on(model()), case.batch(shared), Meter()
    tokens = sum(len(s.tokens) for s in batch.segments)
    engine.forward_backward(batch, LOSSES)
    for _ in range(turns):
        take_gradients(engine)
        with meter.phase("pass"):
            engine.forward_backward(batch, LOSSES)
        meter.emit(tokens=tokens)


def compare(case: TrainCase, dtype: torch.dtype) -> float:
    """The largest over all tensors of |shared - repeated| / |repeated| of the gradients."""
    engine = engine_on(model(dtype))
    found = []
    for shared in (True, False):
        engine.forward_backward(case.batch(shared), LOSSES)
        found.append(take_gradients(engine))
    ours, theirs = found
    return max(float((ours[n] - t).norm() / t.norm()) for n, t in theirs.items())


def main(name: str, side: str, turns: int = 0) -> None:
    case = CASES[name]
    if side == "difference":
        differences = {str(d): compare(case, d) for d in (torch.float32, torch.float64)}
        sys.stdout.write(json.dumps(differences) + "\n")
    else:
        measure(case, side == "shared", turns)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
