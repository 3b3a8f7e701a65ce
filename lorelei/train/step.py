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

    Round k of all works is one mixed pass, after which each adapter steps alone. A ValueError (of
    a loss, or gradients that are not finite) is that of the adapter's own result, and the adapter
    is as before; one that has stepped already raises it. When it raises, no adapter of the round
    holds gradients.
    """
    begun = time.perf_counter()
    # every policy that the losses compare with is evaluated before the first update
    rounds = {work.adapter: _with_policies(engine, work) for work in works}
    results: dict[str, list[RoundResult]] = {name: [] for name in rounds}
    errors: dict[str, ValueError] = {}
    for number in range(max(map(len, rounds.values()))):
        present = [n for n, own in rounds.items() if number < len(own) and n not in errors]
        try:
            found = _round(engine, {name: rounds[name][number] for name in present})
        except ValueError as mixed:
            found = {}
            for name in present:
                before = rounds[name][:number]
                try:
                    if len(present) == 1:
                        raise mixed  # it was alone
                    found |= _alone(engine, name, before, rounds[name][number])
                except ValueError as error:
                    if any(one.step is not None for one in before):
                        raise
                    errors[name] = error
        for name, result in found.items():
            results[name].append(result)
    seconds = time.perf_counter() - begun
    return [
        Result(
            work=work,
            rounds=tuple(results[work.adapter]),
            seconds=seconds,
            error=errors.get(work.adapter),
        )
        for work in works
    ]


def _round(engine: TrainEngine, ones: Mapping[str, Round]) -> dict[str, RoundResult]:
    """One mixed pass, and the steps after it."""
    if not ones:
        return {}
    outputs = engine.forward_backward(
        concatenate([one.batch for one in ones.values()]),
        {name: one.loss for name, one in ones.items()},
    )
    hyper = {name: one.step for name, one in ones.items() if one.step is not None}
    taken = engine.optim_step(hyper) if hyper else {}
    found: dict[str, RoundResult] = {}
    start = 0
    for name, one in ones.items():
        rows = slice(start, start + len(one.batch.items))
        start = rows.stop
        items = ItemOutputs(
            logprobs=outputs.items.logprobs[rows], entropy=outputs.items.entropy[rows]
        )
        metrics = outputs.metrics[name]
        found[name] = RoundResult(outputs=items, metrics=metrics, step=taken.get(name))
    return found


def _alone(
    engine: TrainEngine, name: str, before: Sequence[Round], one: Round
) -> dict[str, RoundResult]:
    """A round again by itself: the mixed pass that failed has left nobody any gradients.

    before: the work's earlier rounds; the gradients of those since its last step come first.
    """
    waiting: list[Round] = []
    for earlier in before:
        waiting = [] if earlier.step is not None else [*waiting, earlier]
    for earlier in waiting:
        engine.forward_backward(earlier.batch, {name: earlier.loss})
    return _round(engine, {name: one})


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
