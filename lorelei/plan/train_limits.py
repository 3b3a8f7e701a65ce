"""What a train engine cannot do with a model, known before anything starts. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorelei.config.errors import ConfigError
from lorelei.config.run import RunConfig
from lorelei.config.train import FsdpTrain, MegatronTrain
from lorelei.model.config import ModelSizes


def check_training(config: RunConfig, model: ModelSizes, hf_config: Mapping[str, Any]) -> None:
    """Raises ConfigError with the reason."""
    match config.train:
        case MegatronTrain() as train:
            _check_bridge(hf_config)
            _check_megatron(train, model)
        case FsdpTrain() as train:
            _check_fsdp(train, model)
        case _:
            pass


def _check_fsdp(train: FsdpTrain, model: ModelSizes) -> None:
    for what, count in (("key/value heads", model.kv_heads), ("attention heads", model.heads)):
        _divides("tensor_parallel", train.tensor_parallel, what, count)
    _divides("sequence_parallel", train.sequence_parallel, "attention heads", model.heads)
    width = model.intermediate if model.moe is None else model.moe.intermediate
    _divides("tensor_parallel", train.tensor_parallel, "MLP features", width)


def _check_bridge(hf_config: Mapping[str, Any]) -> None:
    for field in ("attention_bias", "mlp_bias"):
        if hf_config.get(field):
            raise ConfigError(
                f"train.kind: megatron-bridge has no place for this model's {field}; use archon"
            )


def _check_megatron(train: MegatronTrain, model: ModelSizes) -> None:
    _divides("tensor_parallel", train.tensor_parallel, "key/value heads", model.kv_heads)
    _divides("tensor_parallel", train.tensor_parallel, "attention heads", model.heads)
    heads = train.tensor_parallel * train.context_parallel
    if train.context_parallel > 1 and model.kv_heads % heads:
        raise ConfigError(
            f"train.context_parallel: {train.context_parallel} x tensor_parallel "
            f"{train.tensor_parallel} does not divide the model's {model.kv_heads} key/value "
            "heads, which its processes share out in attention; lower one of them"
        )
    _divides("pipeline_parallel", train.pipeline_parallel, "layers", model.layers)
    if model.moe is None:
        _divides("tensor_parallel", train.tensor_parallel, "MLP features", model.intermediate)
        for field in ("expert_parallel", "expert_tensor_parallel"):
            if (value := getattr(train, field)) > 1:
                raise ConfigError(
                    f"train.{field}: {value}, and {model.architecture} has no experts; leave it out"
                )
        return
    if train.tensor_parallel > 1 and not train.sequence_parallel:
        raise ConfigError(
            "train.sequence_parallel: false with tensor_parallel "
            f"{train.tensor_parallel} and experts; Megatron trains a mixture of experts under "
            "tensor parallelism with sequence_parallel: true only"
        )
    _divides("expert_parallel", train.expert_parallel, "experts", model.moe.experts)
    _divides(
        "expert_tensor_parallel",
        train.expert_tensor_parallel,
        "features of an expert",
        model.moe.intermediate,
    )
    dense = [layer for layer in range(model.layers) if not model.moe.is_sparse(layer)]
    if dense:
        _divides("tensor_parallel", train.tensor_parallel, "MLP features", model.intermediate)


def _divides(field: str, value: int, what: str, count: int) -> None:
    if count % value:
        allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0 and n <= 64)
        raise ConfigError(
            f"train.{field}: {value} does not divide the model's {count} {what}; allowed: {allowed}"
        )
