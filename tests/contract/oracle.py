"""GRPO written out on padded sequences, over transformers, peft and torch's autograd.

Nothing in here is computed by our own decoder, batch, loss or optimizer.
Shapes: B rows, T padded tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from lorelei.lora.targets import FUSED
from lorelei.types import AdapterSpec, Rollout, Turn
from tests.parity.oracle import hf_model, peft_model, plain_name
from tests.parity.test_lora_parity import merged_weights


class Oracle(Protocol):
    """One adapter on the base model, trainable by torch."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor: ...


class PeftOracle:
    """peft's own layers."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        spec: AdapterSpec,
        tensors: Mapping[str, Tensor],
        attention: str | None = None,
    ) -> None:
        """attention: transformers' implementation. Default: its own choice."""
        self._model = peft_model(folder, dtype, spec, tensors, attention)
        trained = ((n, p) for n, p in self._model.named_parameters() if p.requires_grad)
        self.parameters = {plain_name(name): tensor for name, tensor in trained}

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self._model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits


class MergedOracle:
    """W + scale * B A in transformers' model: peft 0.18 leaves stacked experts out.

    Names that share a tensor share a parameter.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, spec: AdapterSpec, tensors: Mapping[str, Tensor]
    ) -> None:
        self._model, self._scale = hf_model(folder, dtype), spec.scale
        own = {id(t): t.clone().to(dtype).requires_grad_() for t in tensors.values()}
        self.parameters = {n: own[id(t)] for n, t in tensors.items()}

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        weights = dict(self._model.named_parameters())
        merged = merged_weights(weights, self.parameters, self._scale)
        options = {"input_ids": tokens_BT, "attention_mask": mask_BT, "use_cache": False}
        return functional_call(self._model, merged, kwargs=options).logits


class BaseOracle:
    """The base model alone."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._model = hf_model(folder, dtype)
        self.parameters: Mapping[str, Tensor] = {}

    def logits(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self._model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits


def make_oracle(
    family: str, folder: Path, dtype: torch.dtype, spec: AdapterSpec, tensors: Mapping[str, Tensor]
) -> Oracle:
    """The oracle that can express the family's adapters, and what they share."""
    merged = family == "qwen3_moe" or not FUSED.keys().isdisjoint(spec.target_modules)
    kind = MergedOracle if merged else PeftOracle
    return kind(folder, dtype, spec, tensors)


def turn_logprobs(
    oracle: Oracle, turns: Sequence[Turn], temperature: float
) -> list[tuple[Tensor, Tensor]]:
    """(log-probabilities, entropies) of each turn's completion, from one padded batch."""
    rows = [[*t.prompt.tolist(), *t.completion.tokens.tolist()] for t in turns]
    longest = max(map(len, rows))
    tokens_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logp_BTV = (oracle.logits(tokens_BT, mask_BT) / temperature).log_softmax(-1)
    found: list[tuple[Tensor, Tensor]] = []
    for b, (t, row) in enumerate(zip(turns, rows, strict=True)):
        sampled = torch.tensor(row[len(t.prompt) :])
        logp_tV = logp_BTV[b, len(t.prompt) - 1 : len(row) - 1]
        picked = logp_tV[torch.arange(len(sampled)), sampled]
        found.append((picked, -(logp_tV.exp() * logp_tV).sum(-1)))
    return found


def grpo_loss(
    oracle: Oracle, rollouts: Sequence[Rollout], eps: float = 0.2, temperature: float = 1.0
) -> Tensor:
    """Mean over rollouts of the mean over tokens of -min(r A, clip(r, 1 - eps, 1 + eps) A).

    r = current / behaviour; A is the rollout's reward. Source: arXiv 2402.03300, eq. 3.
    """
    turns = [t for r in rollouts for t in r.turns]
    outputs = iter(turn_logprobs(oracle, turns, temperature))
    losses: list[Tensor] = []
    for r in rollouts:
        current = torch.cat([next(outputs)[0] for _ in r.turns])
        behaviour = torch.cat([torch.from_numpy(t.completion.logprobs) for t in r.turns])
        ratio = (current - behaviour).exp()
        assert r.reward is not None
        clipped = ratio.clip(1 - eps, 1 + eps)
        losses.append(-torch.minimum(ratio * r.reward, clipped * r.reward).mean())
    return torch.stack(losses).mean()
