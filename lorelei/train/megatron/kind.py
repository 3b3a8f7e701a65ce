"""What a run must know of the engine megatron before it starts. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorelei.config.errors import ConfigError
from lorelei.config.train import MegatronTrain
from lorelei.model.config import ModelSizes
from lorelei.train.kind import (
    Amount,
    BaseModel,
    EngineSpec,
    RankShare,
    TrainKind,
    check_divides,
)

if TYPE_CHECKING:
    from lorelei.parallel.ranks import Ranks
    from lorelei.train.contract import TrainEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSpec(EngineSpec):
    """One of the ranks; what these sizes leave of the world is data-parallel."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False


def _build(spec: MegatronSpec, ranks: Ranks) -> TrainEngine:
    from lorelei.train.megatron.start import start_engine

    return start_engine(spec, ranks)


def _check(train: MegatronTrain, model: ModelSizes, hf_config: Mapping[str, Any]) -> None:
    for field in ("attention_bias", "mlp_bias"):
        if hf_config.get(field):
            raise ConfigError(
                f"train.kind: megatron-bridge has no place for this model's {field}; use archon"
            )
    tensor = train.tensor_parallel
    check_divides("tensor_parallel", tensor, "key/value heads", model.kv_heads)
    check_divides("tensor_parallel", tensor, "attention heads", model.heads)
    if train.context_parallel > 1 and model.kv_heads % (tensor * train.context_parallel):
        raise ConfigError(
            f"train.context_parallel: {train.context_parallel} x tensor_parallel {tensor} does not "
            f"divide the model's {model.kv_heads} key/value heads, which its processes share out "
            "in attention; lower one of them"
        )
    check_divides("pipeline_parallel", train.pipeline_parallel, "layers", model.layers)
    has_dense = model.moe is None or not all(map(model.moe.is_sparse, range(model.layers)))
    if model.moe is None:
        for field in ("expert_parallel", "expert_tensor_parallel"):
            if (value := getattr(train, field)) > 1:
                raise ConfigError(
                    f"train.{field}: {value}, and {model.architecture} has no experts; leave it out"
                )
    else:
        if tensor > 1 and not train.sequence_parallel:
            raise ConfigError(
                f"train.sequence_parallel: false with tensor_parallel {tensor} and experts; "
                "Megatron trains a mixture of experts under tensor parallelism with "
                "sequence_parallel: true only"
            )
        check_divides("expert_parallel", train.expert_parallel, "experts", model.moe.experts)
        of_expert = ("features of an expert", model.moe.intermediate)
        check_divides("expert_tensor_parallel", train.expert_tensor_parallel, *of_expert)
    if has_dense:
        check_divides("tensor_parallel", tensor, "MLP features", model.intermediate)


def _shares(train: MegatronTrain, base: BaseModel) -> Sequence[RankShare]:
    """The first stage and the last: one keeps the most micro-batches, the other has the head."""
    count = train.pipeline_parallel
    if count == 1:
        return (_share(train, base, in_flight=1, head=True),)
    first = _share(train, base, in_flight=count, head=False)
    return (first, _share(train, base, in_flight=1, head=True))


def _share(train: MegatronTrain, base: BaseModel, in_flight: int, head: bool) -> RankShare:
    counts, every, tensor = base.parameters, base.sizes.layers, train.tensor_parallel
    experts = base.sizes.moe is not None
    layers = -(-every // train.pipeline_parallel)
    across = train.expert_parallel * train.expert_tensor_parallel if experts else tensor
    dense = counts["attention"] + counts["norms"] + counts.get("routers", 0)
    held = dense * layers // every // tensor + counts["mlp"] * layers // every // across
    ends = base.ends
    if train.pipeline_parallel > 1:  # the first stage has one, the last the other
        ends = counts["lm_head"] or counts["embeddings"] if head else counts["embeddings"]
    how = f"{held:,} parameters of {layers} layers"
    how += f" and {ends // tensor:,} of {'the head' if head else 'the embedding'}"
    how = f"({how}) x {base.item_bytes} bytes"
    return RankShare(
        base=(Amount("base model", (held + ends // tensor) * base.item_bytes, how),),
        layers=layers,
        in_flight=in_flight,
        head=head,
        adapter_parts=train.pipeline_parallel * train.expert_parallel,
        adapter_split=_split(train, experts),
    )


def _split(train: MegatronTrain, experts: bool) -> str:
    stages = f" / {train.pipeline_parallel} stages" if train.pipeline_parallel > 1 else ""
    dealt = experts and train.expert_parallel > 1
    return stages + (f" / {train.expert_parallel} expert parallel" if dealt else "")


KIND = TrainKind(
    config=MegatronTrain,
    spec=MegatronSpec,
    build=_build,
    shares=_shares,
    check=_check,
    venv="megatron",
)
