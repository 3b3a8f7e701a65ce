"""What the training benchmarks train on: batches of one shape, and an engine with an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import ALPHA, MODEL, RANK
from lorelei.algo.loss import item_weights
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.model.locate import resolve_model
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import rollout_batch
from lorelei.train.contract import TrainEngine
from lorelei.train.layout import flatten
from lorelei.types import AdamHyper, AdapterSpec, Batch, Completion, LossSpec, Rollout, Turn

ADAPTER = "default"
SPEC = AdapterSpec(rank=RANK, alpha=ALPHA)
# the ratio is 1 and nothing is clipped: the gradient is that of the first update of a batch
LOSSES = {ADAPTER: LossSpec(path="lorelei.algo.clip:loss", params={"form": "recomputed"})}
# the first moment of a step with beta1 = 0 is the gradient; lr = 0 leaves the weights alone
LOOK = AdamHyper(lr=0.0, beta1=0.0, max_grad_norm=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainCase:
    """Groups of one length. The last new token of a sample is predicted, never read."""

    name: str
    groups: int
    samples: int
    prompt_tokens: int
    new_tokens: int

    def batch(self, shared: bool = True) -> Batch:
        """Random tokens; not shared: every sample is a plain sequence with its own prompt."""
        draw = np.random.default_rng(0)
        groups = [self._rollouts(draw) for _ in range(self.groups)]
        advantages = [
            [np.full(self.new_tokens, a, np.float32) for a in draw.normal(size=self.samples)]
            for _ in groups
        ]
        if not shared:
            alone = [[rollout] for group in groups for rollout in group]
            apart = [[advantage] for own in advantages for advantage in own]
            batch = flatten(rollout_batch(ADAPTER, alone, {"advantage": apart}, 1.0))
        else:
            batch = rollout_batch(ADAPTER, groups, {"advantage": advantages}, 1.0)
        weight = item_weights(batch.items.sequence, "sequence")
        return replace(batch, items=replace(batch.items, weight=weight))

    def _rollouts(self, draw: np.random.Generator) -> list[Rollout]:
        prompt = draw.integers(1000, 40000, self.prompt_tokens).astype(np.int32)
        completions = [
            Completion(
                tokens=draw.integers(1000, 40000, self.new_tokens).astype(np.int32),
                logprobs=np.zeros(self.new_tokens, dtype=np.float32),
                versions=((0, self.new_tokens),),
                finish_reason="length",
            )
            for _ in range(self.samples)
        ]
        return [
            Rollout(
                adapter=ADAPTER,
                sample=number,
                turns=(Turn(prompt=prompt, completion=completion, text=""),),
                reward=0.0,
            )
            for number, completion in enumerate(completions)
        ]


def model(dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of all cases."""
    return load_decoder(resolve_model(MODEL), dtype)


def engine_on(decoder: Decoder) -> TrainEngine:
    """An engine with one adapter whose B is not zero, so that every gradient is alive."""
    engine = archon_engine(decoder)
    engine.add_adapter(ADAPTER, SPEC)
    draw = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(t.shape, generator=draw).to(t.dtype) * 0.02 if "lora_B" in name else t
        for name, t in engine.adapter_state(ADAPTER).tensors.items()
    }
    zeros = {name: torch.zeros_like(t) for name, t in tensors.items()}
    state = AdapterState(spec=SPEC, tensors=tensors)
    engine.restore(ADAPTER, AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0))
    return engine


def take_gradients(engine: TrainEngine) -> Mapping[str, Tensor]:
    """The gradients that the adapter holds; they are gone afterwards."""
    engine.optim_step({ADAPTER: LOOK})
    return engine.snapshot(ADAPTER).exp_avg
