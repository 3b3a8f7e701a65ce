"""A train engine driven by calls alone; through a loop: tests/unit/jobs/test_live.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorelei.train.archon.engine import archon_engine
from lorelei.types import AdamHyper, AdapterSpec, Batch, Items, LossSpec, Segment
from tests.decoders import load_decoder
from tests.tiny_models import make_tiny

LIKELIHOOD = LossSpec(path="tests.contract.losses:likelihood", params={"factor": 1.0})
GRPO = LossSpec(path="lorelei.algo.clip:loss", params={"eps_clip": 0.1, "form": "plain"})


def sentence_batch(adapter: str, tokens: list[int], advantage: float) -> Batch:
    """One sequence, every token but the first predicted: what a request holds, made by hand."""
    count = len(tokens) - 1
    ones = np.ones(count, dtype=np.float32)
    return Batch(
        segments=(
            Segment(
                tokens=np.array(tokens[:-1], dtype=np.int32), parent=-1, start=0, adapter=adapter
            ),
        ),
        items=Items(
            source=np.arange(count),
            target=np.array(tokens[1:], dtype=np.int64),
            weight=ones / count,
            temperature=ones,
            sequence=np.zeros(count, dtype=np.int64),
            streams={"advantage": ones * advantage, "behaviour": ones * -5.7},
        ),
    )


def test_two_adapters_learn_from_calls_that_come_in_any_order(tmp_path: Path) -> None:
    engine = archon_engine(load_decoder(make_tiny("llama", tmp_path)))
    spec = AdapterSpec(rank=4, alpha=16)
    supervised, rewarded = [5, 17, 200, 42, 8, 9], [5, 17, 30, 31, 32]
    engine.add_adapter("alice", spec, seed=1)

    # Alice fits a sentence: two micro-requests accumulate, then one step
    batch = sentence_batch("alice", supervised, 0.0)
    before = engine.logprobs(batch, "current").logprobs.mean()
    for _ in range(6):
        engine.forward_backward(batch, {"alice": LIKELIHOOD})
        engine.forward_backward(batch, {"alice": LIKELIHOOD})
        stats = engine.optim_step({"alice": AdamHyper(lr=1e-2)})
    assert stats["alice"].step == 6
    learned = engine.logprobs(batch, "current").logprobs.mean()
    assert learned > before + 2
    saved = engine.snapshot("alice")

    # Bob joins, and is punished for another sentence; Alice's adapter rests
    engine.add_adapter("bob", spec, seed=1)
    other = sentence_batch("bob", rewarded, -1.0)
    disliked = engine.logprobs(other, "current").logprobs.mean()
    for _ in range(3):
        engine.forward_backward(other, {"bob": GRPO})
        engine.optim_step({"bob": AdamHyper(lr=1e-2)})
    assert engine.logprobs(other, "current").logprobs.mean() < disliked - 0.5
    assert engine.adapter_state("alice").digest() == saved.state.digest()

    # Alice's gradients wait while Bob steps; later she steps from where she was
    engine.forward_backward(batch, {"alice": LIKELIHOOD})
    engine.forward_backward(other, {"bob": GRPO})
    engine.optim_step({"bob": AdamHyper(lr=1e-2)})
    assert engine.optim_step({"alice": AdamHyper(lr=1e-2)})["alice"].step == 7

    # a service restarts: the saved snapshot alone brings Alice back
    again = archon_engine(load_decoder(tmp_path))
    again.add_adapter("alice", spec)
    again.restore("alice", saved)
    assert again.logprobs(batch, "current").logprobs.mean() == learned
    again.forward_backward(batch, {"alice": LIKELIHOOD})
    again.optim_step({"alice": AdamHyper(lr=1e-2)})
    assert again.adapter_state("alice").digest() == engine.adapter_state("alice").digest()
