"""What transformers and peft compute with the versions that are on the stage.

In fp64 where transformers allows it: in fp32 they are as far from the truth as any engine is, and a
comparison would count both errors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from peft import set_peft_model_state_dict
from transformers import PreTrainedModel

from acceptance.stage import Stage
from lorelei.types import Floats, Ints
from tests.contract.reference_rollout import (
    reference_logits,
    reference_logprobs,
    reference_model,
)


class Reference:
    """One base model and one adapter, which holds one version after another. Version 0: none."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._base = reference_model(stage.model).double()
        self._adapted = reference_model(stage.model, stage.state(1)).double()
        self._held = 1

    def logprobs(self, version: int, tokens: Ints, temperature: float = 1.0) -> Floats:
        """[T - 1] of tokens 1..T-1."""
        return reference_logprobs(self._model(version), tokens, temperature)

    def greedy(self, version: int, tokens: Ints) -> NDArray[np.int64]:
        """[T] the likeliest token after each of these."""
        return reference_logits(self._model(version), tokens).argmax(-1).numpy()

    def _model(self, version: int) -> PreTrainedModel:
        if version == 0:
            return self._base
        if version != self._held:
            tensors = self._stage.state(version).tensors
            set_peft_model_state_dict(self._adapted, dict(tensors))
            self._held = version
        return self._adapted
