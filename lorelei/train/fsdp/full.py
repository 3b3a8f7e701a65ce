"""Full fine-tuning on a model of transformers: a sharded copy, every weight of which is trained."""

from __future__ import annotations

import torch
from torch import Tensor

from lorelei.lora.full import FullWeights
from lorelei.model.linear import FrozenLinear, FusedInput
from lorelei.train.fsdp.model import HostedModel


def hosted_copy(base: HostedModel, dtype: torch.dtype) -> FullWeights[HostedModel]:
    """Read from the checkpoint again: the base is as it was there.

    Raises ValueError with tensor parallelism, where norms would get parts of their gradients.
    """
    if base.mesh.tensor.size > 1:
        raise ValueError(
            f"train.tensor_parallel: {base.mesh.tensor.size} is not built for lora.use_lora: "
            "false; set it to 1 and use train.data_parallel"
        )
    copy = base.trained_copy(dtype)
    return FullWeights(decoder=copy, named=copy.named, route=WholeRoute())


class WholeRoute:
    """Implements lora.linear.ModelRoute where no layer has adapters and every one is trained."""

    def __call__(
        self, layer: FrozenLinear, x_TD: Tensor, fused_input: FusedInput | None = None
    ) -> Tensor:
        raise AssertionError("layers multiply with their own weights")

    def adapts(self, layer: FrozenLinear) -> bool:
        return True

    def take(self, index: Tensor) -> WholeRoute:
        return self
