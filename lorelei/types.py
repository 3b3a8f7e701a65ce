"""The values that cross module borders. No torch at load.

Shapes: T tokens, P prompt tokens, I prediction items, G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]

FinishReason = Literal["stop", "length", "abort"]
Policy = str  # whose log-probabilities: CURRENT, BASE, or a name that the train engine holds
CURRENT: Policy = "current"  # each segment's own adapter, as it is trained
BASE: Policy = "base"  # the base model, no adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem of a task, ready for the model."""

    id: str  # stable for a (task, seed): the same problem has the same id in every run
    tokens: Ints  # [P]
    messages: tuple[Mapping[str, Any], ...]  # chat messages behind `tokens`
    data: Mapping[str, Any]  # what the reward needs: answer, metadata, dataset columns
    tools: tuple[Mapping[str, Any], ...] = ()  # that the row offers, as OpenAI describes them


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The shape of an adapter; everything that decides which tensors it has.

    Rank 0 is full fine-tuning (FULL_WEIGHTS): every weight of the model, under the checkpoint's
    names; the other fields then mean nothing.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0

    @property
    def full(self) -> bool:
        """Whether it is the whole model, and not LoRA matrices on it."""
        return self.rank == 0

    @property
    def scale(self) -> float:
        """Factor on B @ A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)."""
        if self.full:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


FULL_WEIGHTS = AdapterSpec(rank=0, alpha=1.0, target_modules=())


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One immutable adapter version as a rollout engine sees it."""

    name: str
    version: int
    run_id: str
    digest: str  # of the tensors, see lora.state.digest

    @property
    def served_name(self) -> str:
        """A name that is never used again: run, adapter, version and content."""
        return f"{self.name}-v{self.version}-{self.run_id}-{self.digest[:12]}"

    def __str__(self) -> str:
        return f"{self.name}@v{self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one completion is drawn. Temperature 0 is greedy.

    top_k, top_p and min_p are for evaluation and chat: in training the log-probability of a
    truncated distribution is not the one the loss needs, and the configuration refuses them.
    """

    temperature: float = 1.0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One completion of one prompt. Requests with equal adapter and tokens share a prefill."""

    tokens: Ints  # [P]
    adapter: AdapterRef | None  # None: the base model
    sampling: SamplingParams
    key: str  # names the random stream with sampling.seed: the same key draws the same numbers
    position: int = 0  # how many of `tokens`, at their end, were drawn from this stream before


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One sampled continuation. The stop token, when there is one, is its last token."""

    tokens: Ints  # [T]
    logprobs: Floats  # [T] nats, temperature-scaled, full vocabulary, of the policy that sampled
    versions: tuple[tuple[int, int], ...]  # spans (adapter version, number of tokens)
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What the model read and what it answered, as token ids; never re-tokenised."""

    prompt: Ints  # [P] all tokens the model conditioned on, earlier turns included
    completion: Completion
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One episode. `error` says why it failed; its siblings live on.

    One without a reward or an error is of a run that has none.
    """

    adapter: str
    sample: int
    turns: tuple[Turn, ...]
    reward: float | None
    error: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0
    baseline: float | None = None  # the reward of the greedy answer, where the algorithm asks

    @property
    def sampled_tokens(self) -> int:
        return sum(len(turn.completion.tokens) for turn in self.turns)

    @property
    def trainable(self) -> bool:
        """Whether it did not fail and has at least one sampled token."""
        return self.error is None and self.sampled_tokens > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one prompt, in sample order."""

    adapter: str
    index: int  # position of the prompt in the adapter's data order
    prompt: Prompt
    rollouts: tuple[Rollout, ...]

    @property
    def min_version(self) -> int:
        """The oldest adapter version that sampled any token of the group."""
        return min(self._versions(), default=0)

    @property
    def newest_version(self) -> int:
        """The newest adapter version that sampled any token of the group."""
        return max(self._versions(), default=0)

    def _versions(self) -> list[int]:
        return [v for r in self.rollouts for t in r.turns for v, _ in t.completion.versions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A sequence that is given, and which of its tokens are to be learnt."""

    id: str
    tokens: Ints  # [T]
    predicted: NDArray[np.bool_]  # [T]; the first token cannot be predicted
    weight: float = 1.0  # of its tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A prompt, answers to it that are given, and what is thought of each."""

    id: str
    prompt: Ints  # [P]
    answers: tuple[Ints, ...]  # [T] each, with the token that ends it
    signs: tuple[int, ...]  # +1: chosen, or desirable; -1: rejected, or undesirable

    @property
    def tokens(self) -> Ints:
        """[T] the prompt and its first answer."""
        return np.concatenate([self.prompt, self.answers[0]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A run of tokens that continues its parent segment (or starts a sequence).

    Segments with the same parent share the parent's computation; a parent stands before its
    children and belongs to the same adapter.
    """

    tokens: Ints  # [T]
    parent: int  # index of the parent segment in the batch, -1: none
    start: int  # position of tokens[0] in its sequence
    adapter: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """Aligned arrays [I]: one predicted token each.

    `source` indexes the concatenation of all segments of the batch: the position whose output
    predicts `target`. `weight` holds every normaliser, so that a loss is a plain sum. `streams`
    are what losses read besides, by the names that they declare: advantage; behaviour, proximal,
    reference (log-probabilities of the policy that sampled, of the one at the start of the update,
    of a frozen one); ... Where adapters of a batch have different ones, a stream is NaN for the
    items of an adapter without it.
    """

    source: Longs
    target: Longs
    weight: Floats
    temperature: Floats
    sequence: Longs  # number of the rollout, or of another sequence, within the batch
    streams: Mapping[str, Floats] = field(default_factory=dict[str, Floats])

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Segments and the items predicted from them."""

    segments: tuple[Segment, ...]
    items: Items

    @property
    def adapters(self) -> tuple[str, ...]:
        """Adapters in order of first appearance."""
        return tuple(dict.fromkeys(s.adapter for s in self.segments))


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """A loss by import path and frozen parameters, so that it can travel to other processes."""

    path: str  # "package.module:function", or "/folder/file.py:function"
    params: Mapping[str, float | bool | str | None]
    streams: tuple[str, ...] = ()  # that an item must have; others may be read where they are there


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamHyper:
    """One AdamW step of one adapter (decoupled weight decay)."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemOutputs:
    """What the model says of every item, in item order."""

    logprobs: Floats  # [I] of the target, temperature-scaled, nats
    entropy: Floats  # [I] of the temperature-scaled distribution, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOutputs:
    """The result of one forward_backward."""

    items: ItemOutputs
    loss: Mapping[str, float]  # by adapter, the weighted sum
    metrics: Mapping[
        str, Mapping[str, float]
    ]  # by adapter; sums over items, weighted like the loss


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStats:
    """One optimizer step of one adapter."""

    grad_norm: float  # before clipping
    step: int  # optimizer steps taken, this one included
