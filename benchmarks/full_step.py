"""GRPO steps by Lorelei with LoRA or with full fine-tuning, and a checkpoint after them.

usage: -m benchmarks.full_step CASE STEPS SIDE   (SIDE: lora, full)
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.cases import ALPHA, LR, RANK, STEP_CASES
from benchmarks.meter import Meter
from benchmarks.ours_step import main
from lorelei.store.durable import write_file
from lorelei.store.snapshot import snapshot_bytes
from lorelei.train.contract import TrainEngine

# {side: (the lora section, learning rate)}
SIDES: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"lora_rank": RANK, "lora_alpha": ALPHA}, LR),
    "full": ({"use_lora": False}, LR / 10),
}


def checkpoint(engine: TrainEngine, meter: Meter) -> None:
    """Write one as a run does, and say how large it is."""
    with tempfile.TemporaryDirectory() as folder, meter.phase("checkpoint"):
        snapshot = engine.snapshot("default")
        data = snapshot_bytes(snapshot)
        write_file(Path(folder) / "snapshot.safetensors", data)
    trained = sum(tensor.numel() for tensor in snapshot.state.tensors.values())
    meter.emit(bytes=len(data), trained=trained)


if __name__ == "__main__":
    lora, lr = SIDES[sys.argv[3]]
    asyncio.run(main(STEP_CASES[sys.argv[1]], int(sys.argv[2]), lora, lr, checkpoint))
