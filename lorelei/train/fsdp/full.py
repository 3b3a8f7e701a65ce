"""Full fine-tuning on a model of transformers: a sharded copy, every weight of which is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorelei.model.linear import FrozenLinear, FusedInput
from lorelei.train.fsdp.model import HostedModel
from lorelei.types import FULL_WEIGHTS, AdapterSpec


@dataclass(frozen=True, slots=True, eq=False)
class HostedWeights:
    """Implements lora.bank.Trained."""

    spec: AdapterSpec
    decoder: HostedModel

    @classmethod
    def copy_of(cls, base: HostedModel, dtype: torch.dtype) -> HostedWeights:
        """Read from the checkpoint again: the base is as it was there.

        Raises ValueError with tensor parallelism, where norms would get parts of their gradients.
        """
        if base.mesh.tensor.size > 1:
            raise ValueError(
                f"train.tensor_parallel: {base.mesh.tensor.size} is not built for lora.use_lora: "
                "false; set it to 1 and use train.data_parallel"
            )
        return cls(FULL_WEIGHTS, base.trained_copy(dtype))

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by the checkpoint's names, sorted."""
        return self.decoder.named()

    def route(self) -> WholeRoute:
        """Every token through it."""
        return WholeRoute()


class WholeRoute:
    """Implements lora.bank.ModelRoute where no layer has adapters and every one is trained."""

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        raise AssertionError("layers multiply with their own weights")

    def adapts(self, layer: FrozenLinear) -> bool:
        return True

    def take(self, index: Tensor) -> WholeRoute:
        return self
