"""Forward and backward passes of one case by archon, and its bare products, in turns.

usage: -m benchmarks.ours_forward_backward CASE TURNS
"""

from __future__ import annotations

import json
import sys

from benchmarks.bare_products import BareProducts
from benchmarks.forward_backward import CASES
from benchmarks.part_clock import PartClock
from benchmarks.train_case import LOSSES, TrainCase, engine_on, model, take_gradients
from lorelei.config.train import ArchonTrain
from lorelei.train.layout import micro_batches

WARM_UP = 2  # turns left out: the first packs weights, and both grow the heap


def main(case: TrainCase, turns: int) -> None:
    decoder, clock, batch = model(), PartClock(), case.batch()
    clock.stamp_training(decoder)
    engine = engine_on(decoder)
    limit = ArchonTrain().max_tokens_per_mb
    bare = [BareProducts(decoder, piece.batch) for piece in micro_batches(batch, limit)]
    for turn in range(WARM_UP + turns):
        clock.start()
        engine.forward_backward(batch, LOSSES)
        own = clock.stop()
        take_gradients(engine)
        products: dict[str, float] = {}
        for one in bare:
            for part, seconds in one.seconds().items():
                products[part] = products.get(part, 0.0) + seconds
        if turn >= WARM_UP:
            sys.stdout.write(json.dumps({"own": own, "bare": products}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(CASES[sys.argv[1]], int(sys.argv[2]))
