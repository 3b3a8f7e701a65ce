"""Moving a frozen model between an accelerator and the host's memory."""

from __future__ import annotations

import torch
from torch import nn

HOST = torch.device("cpu")


def move(model: nn.Module, device: torch.device) -> None:
    """Copy parameters and buffers there; what they held is free, for other processes too.

    Parameters stay the objects they are, and so do FSDP's shards. On a CPU nothing is gained.
    """
    # not .to(), which would do nothing on a CPU, where this is tested
    model._apply(lambda tensor: tensor.to(device, copy=True))
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
