"""Which requests an engine can serve."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from lorelei.types import AdapterRef, GenerateRequest, Ints, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Checks requests before they reach the decode thread. All raise ValueError."""

    vocab: int
    context: int  # prompt and answer together
    decodes_text: bool  # there is a tokenizer for stop strings

    def check_request(self, request: GenerateRequest) -> None:
        self._check_tokens(request.tokens, "prompt")
        if len(request.tokens) >= self.context:
            raise ValueError(
                f"prompt: {len(request.tokens)} tokens leave no room to answer in a context of "
                f"{self.context}; shorten the prompt or raise rollout.max_context"
            )
        self._check_sampling(request.sampling)

    def check_sequence(self, tokens: Ints) -> None:
        self._check_tokens(tokens, "sequence")
        if len(tokens) > self.context:
            raise ValueError(
                f"sequence: {len(tokens)} tokens do not fit a context of {self.context}; "
                "shorten it or raise rollout.max_context"
            )

    def new_tokens(self, request: GenerateRequest) -> int:
        """How many tokens the answer may have."""
        return min(request.sampling.max_new_tokens, self.context - len(request.tokens))

    def _check_tokens(self, tokens: Ints, what: str) -> None:
        if len(tokens) == 0:
            raise ValueError(f"{what}: 0 tokens; at least 1 is needed")
        if tokens.min() < 0 or tokens.max() >= self.vocab:
            raise ValueError(
                f"{what}: token ids from {tokens.min()} to {tokens.max()} are not all in "
                f"[0, {self.vocab}); was it made with this model's tokenizer?"
            )

    def _check_sampling(self, sampling: SamplingParams) -> None:
        if sampling.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {sampling.max_new_tokens} is not at least 1")
        if not 0 <= sampling.temperature < float("inf"):
            raise ValueError(f"temperature: {sampling.temperature} is not a number from 0 up")
        if "" in sampling.stop_strings:
            raise ValueError("stop_strings: an empty string would stop at once; remove it")
        if sampling.stop_strings and not self.decodes_text:
            raise ValueError(
                f"stop_strings: {sampling.stop_strings!r} need an engine with a tokenizer; "
                "use stop_token_ids"
            )


def check_loaded(ref: AdapterRef | None, loaded: Collection[str]) -> None:
    """loaded: served names. Raises KeyError for a version that is not among them."""
    if ref is not None and ref.served_name not in loaded:
        names = ", ".join(sorted(loaded)) or "none"
        raise KeyError(f"adapter {ref} ({ref.served_name}) is not loaded; loaded: {names}")
