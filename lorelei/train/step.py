"""One pass of training over any train engine: works of several adapters in, results out.

Consumes the works that are ready, produces a result for each, waits for the engine. It does not
know which losses it runs. Runs in the thread that owns the engine (see EngineThread).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorelei.train.batch import concatenate
from lorelei.train.contract import TrainEngine
from lorelei.train.work import Result, Round, RoundResult, Work
from lorelei.types import Floats, ItemOutputs


def run_works(engine: TrainEngine, works: Sequence[Work]) -> list[Result]:
    """Train each adapter on its work; no other adapter changes.

    Round k of all works is one mixed pass, after which each adapter steps alone. When it raises,
    no adapter of the round holds gradients.
    """
    begun = time.perf_counter()
    # every policy that the losses compare with is evaluated before the first update
    rounds = [_with_policies(engine, work) for work in works]
    results: list[list[RoundResult]] = [[] for _ in works]
    for number in range(max(map(len, rounds))):
        present = [i for i, own in enumerate(rounds) if number < len(own)]
        ones = {works[i].adapter: rounds[i][number] for i in present}
        outputs = engine.forward_backward(
            concatenate([one.batch for one in ones.values()]),
            {name: one.loss for name, one in ones.items()},
        )
        hyper = {name: one.step for name, one in ones.items() if one.step is not None}
        taken = engine.optim_step(hyper) if hyper else {}
        start = 0
        for i, (name, one) in zip(present, ones.items(), strict=True):
            rows = slice(start, start + len(one.batch.items))
            start = rows.stop
            found = ItemOutputs(
                logprobs=outputs.items.logprobs[rows], entropy=outputs.items.entropy[rows]
            )
            metrics = outputs.metrics[name]
            results[i].append(RoundResult(outputs=found, metrics=metrics, step=taken.get(name)))
    seconds = time.perf_counter() - begun
    return [
        Result(work=work, rounds=tuple(own), seconds=seconds)
        for work, own in zip(works, results, strict=True)
    ]


def _with_policies(engine: TrainEngine, work: Work) -> Sequence[Round]:
    """The rounds with the streams that other policies fill, and what follows from those."""
    if not work.policies:
        return work.rounds
    rounds = [
        _with_streams(
            one,
            {
                stream: engine.logprobs(one.batch, policy).logprobs
                for stream, policy in work.policies.items()
            },
        )
        for one in work.rounds
    ]
    if work.advantages is None:
        return rounds
    found = work.advantages([one.batch.items for one in rounds])
    return [_with_streams(one, {"advantage": own}) for one, own in zip(rounds, found, strict=True)]


def _with_streams(one: Round, filled: Mapping[str, Floats]) -> Round:
    items = replace(one.batch.items, streams={**one.batch.items.streams, **filled})
    return replace(one, batch=replace(one.batch, items=items))
