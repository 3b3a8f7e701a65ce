"""Log-probabilities of prompt tokens at the temperature of their request.

SGLang scales by the temperature what it samples, not what it scores.

Shapes: B sequences, T rows of positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Scale the logits of scored positions, and of no other."""
    from sglang.srt.layers.logits_processor import LogitsMetadata
    from sglang.srt.layers.logprob_processor import InputLogprobProcessor

    made = LogitsMetadata.from_forward_batch.__func__

    def from_forward_batch(cls: Any, forward_batch: Any) -> Any:
        metadata = made(cls, forward_batch)
        if metadata.extend_return_logprob and forward_batch.sampling_info is not None:
            metadata.temperature = forward_batch.sampling_info.temperatures.view(-1)
        return metadata

    forward = InputLogprobProcessor.forward

    def scaled_forward(
        self: Any, *, get_logits_fn: Any, logits_metadata: Any, **arguments: Any
    ) -> Any:
        if logits_metadata.temperature is None:
            return forward(
                self, get_logits_fn=get_logits_fn, logits_metadata=logits_metadata, **arguments
            )
        scale_T1 = _scale(logits_metadata, arguments["token_to_seq_idx"])
        done = 0

        def scaled(states_TD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal done
            done += len(states_TD)
            logits_TV = get_logits_fn(states_TD, *args, **kwargs)
            return logits_TV / scale_T1[done - len(states_TD) : done]

        result, sampled_BV = forward(
            self, get_logits_fn=scaled, logits_metadata=logits_metadata, **arguments
        )
        return result, sampled_BV * scale_T1[arguments["sample_indices"]]

    LogitsMetadata.from_forward_batch = classmethod(from_forward_batch)
    InputLogprobProcessor.forward = scaled_forward


def _scale(metadata: Any, sequence_of_row: list[int]) -> Tensor:
    """[T, 1]: the temperature of the rows of scored sequences, 1 for rows that only sample."""
    scored = torch.tensor(metadata.extend_logprob_pruned_lens_cpu) > 0
    temperatures = metadata.temperature
    of_sequence = torch.where(scored.to(temperatures.device), temperatures, 1.0)
    return of_sequence[torch.tensor(sequence_of_row, device=temperatures.device)][:, None]
