"""What one rank of a group of train processes holds while it trains. No torch.

Shapes: T tokens of a micro-batch, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lorelei.model.config import BYTES, CHUNK_ELEMENTS, GPU_LOGITS
from lorelei.plan.memory import (
    FP32,
    Footprint,
    MemoryItem,
    block_elements,
    intermediate,
    micro_batch_tokens,
)
from lorelei.train.kind import BaseModel, RankShare
from lorelei.train.kinds import TRAIN

Counts = Mapping[str, int]  # parameters of the base model by part


def rank_parts(run: Footprint, counts: Counts) -> tuple[MemoryItem, ...]:
    """Of the rank that holds most."""
    train, item_bytes = run.config.train, BYTES[run.config.dtype]
    base = BaseModel(sizes=run.model, parameters=counts, item_bytes=item_bytes, on_cpu=run.on_cpu)
    found = [
        (
            *(MemoryItem(**amount._asdict()) for amount in share.base),
            *_trained(run, share),
            *_working(run, share),
        )
        for share in TRAIN[train.kind].shares(train, base)
    ]
    return max(found, key=lambda parts: sum(p.bytes for p in parts))


def _trained(run: Footprint, share: RankShare) -> Iterator[MemoryItem]:
    trained = sum(size.trained for size in run.adapters)
    for name, copies, what in (
        ("adapters", 1, ""),
        ("gradients", 1, ""),
        ("optimizer", 2, "2 moments x "),
    ):
        yield MemoryItem(
            name=name,
            bytes=copies * trained * FP32 // share.adapter_parts,
            how=f"{what}{trained:,} parameters x {FP32} bytes{share.adapter_split}",
        )
    if run.frozen:
        yield MemoryItem(
            name="frozen adapters",
            bytes=run.frozen * FP32 // share.adapter_parts,
            how=f"{run.frozen:,} parameters of references and teachers x {FP32} bytes"
            f"{share.adapter_split}",
        )


def _working(run: Footprint, share: RankShare) -> Iterator[MemoryItem]:
    """Activations of the micro-batches in flight, and the largest scratch."""
    sizes, model, each = run.config.train.sizes, run.model, BYTES[run.config.dtype]
    tokens = -(-micro_batch_tokens(run) // sizes.context)
    block = block_elements(run) // sizes.tensor
    words = f"{tokens:,} tokens x "
    flight = f"{share.in_flight} micro-batches x " if share.in_flight > 1 else ""
    scratch = tokens * 6 * intermediate(model) // sizes.tensor * each
    if run.config.train.gradient_checkpointing:
        kept = share.in_flight * tokens * share.layers * model.hidden * each
        how = f"{flight}{words}{share.layers} layers x {model.hidden:,} hidden x {each} bytes: the "
        how += "inputs of blocks, the rest is computed again"
        scratch += tokens * block * each
        what = f"{words}{block + 6 * intermediate(model) // sizes.tensor:,} numbers of one block"
    else:
        kept = share.in_flight * tokens * share.layers * block * each
        how = f"{flight}{words}{share.layers} layers x {block:,} numbers x {each} bytes"
        what = f"{words}{6 * intermediate(model) // sizes.tensor:,} numbers of one MLP"
    yield MemoryItem(name="activations", bytes=kept, how=how)
    logits = 3 * CHUNK_ELEMENTS * (1 if run.on_cpu else GPU_LOGITS) * FP32 if share.head else 0
    if logits > scratch:
        what = f"3 chunks of logits x {logits // 3 // FP32:,} x {FP32} bytes"
    else:
        what = f"{what} x {each} bytes, its gradients included"
    yield MemoryItem(name="scratch", bytes=max(logits, scratch), how=what)
