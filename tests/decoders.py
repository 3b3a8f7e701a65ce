"""The decoder that tests run: on a CUDA device where there is one."""

from __future__ import annotations

from pathlib import Path

import torch

from lorelei.model import load
from lorelei.model.decoder import Decoder

# not every accelerator: Apple's has no fp64, in which much is compared
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """A checkpoint folder on DEVICE."""
    return load.load_decoder(folder, dtype, DEVICE)
