"""What one rank of a group of train processes holds while it trains. No torch.

Shapes: T tokens of a micro-batch, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lorelei.config.train import ArchonTrain, FsdpTrain, MegatronTrain
from lorelei.model.config import BYTES, CHUNK_ELEMENTS, GPU_LOGITS
from lorelei.plan.memory import Footprint, block_elements, intermediate, micro_batch_tokens
from lorelei.plan.memory_item import MemoryItem

_FP32 = 4
_GATHERED = 2  # FSDP gathers a block while it computes the one before
Counts = Mapping[str, int]  # parameters of the base model by part


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """The layers that a rank computes, and the micro-batches whose activations it keeps."""

    layers: int
    in_flight: int
    head: bool  # whether it computes the log-probabilities


def rank_parts(run: Footprint, counts: Counts) -> tuple[MemoryItem, ...]:
    """Of the rank that holds most."""
    train = run.config.train
    match train:
        case MegatronTrain():
            stages = _stages(train, run.model.layers)
            found = [(*_megatron(run, counts, train, s), *_working(run, s)) for s in stages]
            return max(found, key=lambda parts: sum(p.bytes for p in parts))
        case FsdpTrain():
            base = (*_fsdp(run, counts, train), *_trained(run, ""))
        case ArchonTrain():
            each = BYTES[run.config.dtype]
            how = f"{run.base:,} parameters x {each} bytes; every rank has its own"
            base = (
                MemoryItem(name="base model", bytes=run.base * each, how=how),
                *_trained(run, ""),
            )
    return (*base, *_working(run, Stage(layers=run.model.layers, in_flight=1, head=True)))


def _fsdp(run: Footprint, counts: Counts, train: FsdpTrain) -> Iterator[MemoryItem]:
    each, tensor = BYTES[run.config.dtype], train.tensor_parallel
    shards = train.data_parallel * train.sequence_parallel
    block = sum(counts[p] for p in ("attention", "mlp", "routers", "norms") if p in counts)
    block //= run.model.layers
    ends = counts["embeddings"] + counts["lm_head"]
    split = f" / {tensor} tensor parallel" if tensor > 1 else ""
    held = f"{run.base:,} parameters"
    if tensor > 1:  # which leaves embedding and head whole
        held = f"({run.base - ends:,} parameters{split} + {ends:,} of embedding and head)"
    offloaded = train.cpu_offload and not run.on_cpu
    if offloaded:
        yield MemoryItem(
            name="base model", bytes=0, how="kept in the CPU's memory: train.cpu_offload"
        )
    else:
        yield MemoryItem(
            name="base model",
            bytes=((run.base - ends) // tensor + ends) * each // shards,
            how=f"{held} x {each} bytes / {shards} shards",
        )
    if shards > 1 or offloaded:
        yield MemoryItem(
            name="gathered blocks",
            bytes=_GATHERED * block * each // tensor,
            how=f"{_GATHERED} blocks x {block:,} parameters x {each} bytes{split}: one is computed "
            "while the next arrives",
        )
        yield MemoryItem(
            name="gathered ends",
            bytes=ends * each,
            how=f"embedding and head: {ends:,} parameters x {each} bytes",
        )


def _megatron(
    run: Footprint, counts: Counts, train: MegatronTrain, stage: Stage
) -> Iterator[MemoryItem]:
    each, tensor, share = BYTES[run.config.dtype], train.tensor_parallel, run.model.layers
    experts = run.model.moe is not None
    across = train.expert_parallel * train.expert_tensor_parallel if experts else tensor
    dense = counts["attention"] + counts["norms"] + counts.get("routers", 0)
    held = dense * stage.layers // share // tensor + counts["mlp"] * stage.layers // share // across
    ends = counts["embeddings"] + counts["lm_head"]
    if train.pipeline_parallel > 1:  # the first stage has one, the last the other
        ends = counts["lm_head"] or counts["embeddings"] if stage.head else counts["embeddings"]
    how = f"{held:,} parameters of {stage.layers} layers"
    how += f" and {ends // tensor:,} of {'the head' if stage.head else 'the embedding'}"
    yield MemoryItem(
        name="base model", bytes=(held + ends // tensor) * each, how=f"({how}) x {each} bytes"
    )
    yield from _trained(run, _divisors(train, experts), train.pipeline_parallel * _experts(train))


def _experts(train: MegatronTrain) -> int:
    return train.expert_parallel if train.expert_parallel > 1 else 1


def _divisors(train: MegatronTrain, experts: bool) -> str:
    words = [
        f"{size} {what}"
        for size, what in (
            (train.pipeline_parallel, "stages"),
            (train.expert_parallel if experts else 1, "expert parallel"),
        )
        if size > 1
    ]
    return "".join(f" / {word}" for word in words)


def _trained(run: Footprint, split: str, parts: int = 1) -> Iterator[MemoryItem]:
    """split, parts: the words for what the adapters are divided by, and the number."""
    trained = sum(size.trained for size in run.adapters)
    for name, copies, what in (
        ("adapters", 1, ""),
        ("gradients", 1, ""),
        ("optimizer", 2, "2 moments x "),
    ):
        yield MemoryItem(
            name=name,
            bytes=copies * trained * _FP32 // parts,
            how=f"{what}{trained:,} parameters x {_FP32} bytes{split}",
        )


def _stages(train: MegatronTrain, layers: int) -> Sequence[Stage]:
    """The first and the last: one keeps the most micro-batches, the other has the head."""
    count = train.pipeline_parallel
    share = -(-layers // count)
    first = Stage(layers=share, in_flight=count, head=count == 1)
    return (first,) if count == 1 else (first, Stage(layers=share, in_flight=1, head=True))


def _working(run: Footprint, stage: Stage) -> Iterator[MemoryItem]:
    """Activations of the micro-batches in flight, and the largest scratch."""
    sizes, model, each = run.config.train.sizes, run.model, BYTES[run.config.dtype]
    tokens = -(-micro_batch_tokens(run) // sizes.context)
    block = block_elements(run) // sizes.tensor
    words = f"{tokens:,} tokens x "
    flight = f"{stage.in_flight} micro-batches x " if stage.in_flight > 1 else ""
    scratch = tokens * 6 * intermediate(model) // sizes.tensor * each
    if run.config.train.gradient_checkpointing:
        kept = stage.in_flight * tokens * stage.layers * model.hidden * each
        how = f"{flight}{words}{stage.layers} layers x {model.hidden:,} hidden x {each} bytes: the "
        how += "inputs of blocks, the rest is computed again"
        scratch += tokens * block * each
        what = f"{words}{block + 6 * intermediate(model) // sizes.tensor:,} numbers of one block"
    else:
        kept = stage.in_flight * tokens * stage.layers * block * each
        how = f"{flight}{words}{stage.layers} layers x {block:,} numbers x {each} bytes"
        what = f"{words}{6 * intermediate(model) // sizes.tensor:,} numbers of one MLP"
    yield MemoryItem(name="activations", bytes=kept, how=how)
    logits = 3 * CHUNK_ELEMENTS * (1 if run.on_cpu else GPU_LOGITS) * _FP32 if stage.head else 0
    if logits > scratch:
        what = f"3 chunks of logits x {logits // 3 // _FP32:,} x {_FP32} bytes"
    else:
        what = f"{what} x {each} bytes, its gradients included"
    yield MemoryItem(name="scratch", bytes=max(logits, scratch), how=what)
