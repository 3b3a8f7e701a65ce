"""The frozen base model: built by Megatron-Bridge from a transformers checkpoint, for this rank.

Attention and rotary embeddings are Lorelei's own, so that a row may hold many sequences and
shared prefixes, and every rope type means the same as in the other engines.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import AutoBridge
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.gpt_provider import local_layer_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn

from lorelei.model.backend import DTYPES
from lorelei.model.config import DecoderConfig
from lorelei.model.rope import frequencies
from lorelei.parallel.mesh import Axis
from lorelei.parallel.ranks import Ranks
from lorelei.parallel.ulysses import to_heads, to_tokens
from lorelei.train.megatron.kind import MegatronSpec
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.train.megatron.row import Row

_NORMS = {  # of layers with separate norms; Transformer Engine fuses them into the linears
    "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
}

# kernels of Transformer Engine and Apex, in place of which torch's operations run
_FUSIONS = (
    *("masked_softmax_fusion", "bias_dropout_fusion", "bias_activation_fusion"),
    *("apply_rope_fusion", "persist_layer_norm", "cross_entropy_loss_fusion", "moe_permute_fusion"),
)


def build_model(
    spec: MegatronSpec, config: DecoderConfig, world: Ranks
) -> tuple[Any, MegatronMesh]:
    """This rank's part of the model, frozen, and its place. Megatron's groups are made here.

    Raises ValueError for a checkpoint that does not fill it.
    """
    bridge = AutoBridge.from_hf_pretrained(spec.model)
    provider = _provider(bridge, spec, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        provider.finalize()
        provider.initialize_model_parallel(seed=0)
        with _norms_in_sequence_parallel():
            [model] = provider.provide_distributed_model(
                wrap_with_ddp=False,
                use_cpu_initialization=not torch.cuda.is_available(),
                mixed_precision_wrapper=None,
            )
    model.requires_grad_(False)
    _load(bridge, model, Path(spec.model))
    mesh = MegatronMesh.current(spec.sequence_parallel, world)
    _use_own_positions(model, config, mesh)
    return model, mesh


def _provider(bridge: Any, spec: MegatronSpec, config: DecoderConfig) -> Any:
    """Megatron's configuration of this model and mesh."""
    dtype = DTYPES[spec.dtype]
    provider = bridge.to_megatron_provider(load_weights=False)
    wanted = {
        "perform_initialization": False,
        "transformer_layer_spec": _layer_spec,
        "position_embedding_type": "rope",
        "vocab_size": config.vocab,
        "should_pad_vocab": config.vocab % spec.tensor_parallel != 0,
        "make_vocab_size_divisible_by": 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": spec.tensor_parallel,
        "pipeline_model_parallel_size": spec.pipeline_parallel,
        "context_parallel_size": spec.context_parallel,
        "expert_model_parallel_size": spec.expert_parallel,
        "expert_tensor_parallel_size": spec.expert_tensor_parallel,
        "sequence_parallel": spec.sequence_parallel,
        "variable_seq_lengths": True,
        "calculate_per_token_loss": True,  # our weights hold every normaliser
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_grouped_gemm": False,  # separate layers, so that each expert has its adapter
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": not torch.cuda.is_available(),
        **dict.fromkeys(_FUSIONS, False),
    }
    if spec.recompute:
        wanted |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    for name, value in wanted.items():
        assert hasattr(provider, name), f"megatron-bridge has no {name}"
        setattr(provider, name, value)
    return provider


def _layer_spec(provider: Any) -> Any:
    """The core's own layers with our attention."""
    made = local_layer_spec(provider)
    made.submodules.self_attention.submodules.core_attention = RowAttention
    return made


class RowAttention(MegatronModule):
    """Attention within the segments of a row and over their ancestors."""

    def __init__(self, config: Any, layer_number: int, *_: Any, **__: Any) -> None:
        super().__init__(config=config)
        assert not config.apply_query_key_layer_scaling and config.softmax_scale is None

        self._layer = layer_number
        self.axis: Axis | None = None  # the ranks that have the rest of the row

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        packed_seq_params: Row,
        **_: Any,
    ) -> Tensor:
        """[t, 1, H, d] and [t, 1, K, d] -> [t, 1, H * d]."""
        assert self.axis is not None
        q, k, v = (to_heads(x[:, 0], self.axis) for x in (query, key, value))
        mixed = to_tokens(packed_seq_params.attention(self._layer, q, k, v), self.axis)
        return mixed.reshape(len(mixed), 1, -1)


class RowRope(nn.Module):
    """The angles of a row's positions, in place of Megatron's, which count the row's tokens."""

    def __init__(self, inverse: Tensor) -> None:
        super().__init__()
        self._inverse = inverse

    def get_rotary_seq_len(self, *arguments: Any) -> Row:
        """Megatron hands the result to `forward`."""
        return arguments[-1]

    def forward(self, row: Row, **_: Any) -> Tensor:
        """[t, 1, 1, d]."""
        angles = row.positions_t.to(torch.float32)[:, None] * self._inverse.to(
            row.positions_t.device
        )
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def _use_own_positions(model: Any, config: DecoderConfig, mesh: MegatronMesh) -> None:
    inverse, scale = frequencies(config)
    model.rotary_pos_emb = RowRope(inverse)
    for layer in model.decoder.layers:
        layer.self_attention._yarn_concentration_factor = scale
        layer.self_attention.core_attention.axis = mesh.context


def _load(bridge: Any, model: Any, folder: Path) -> None:
    """Read the weights of this rank, and make sure that all of them came."""
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    kind = type(bridge._model_bridge)
    if not getattr(kind, "_lorelei_norms", False):
        kind.mapping_registry = _with_norms(kind.mapping_registry)
        kind._lorelei_norms = True
    bridge.load_hf_weights([model])
    empty = [n for n, p in model.named_parameters() if p.isnan().any()]
    if empty:
        raise ValueError(
            f"model: {folder} gives no numbers for {empty[0]} (of {len(empty)}); get it again"
        )


def _with_norms(own: Any) -> Any:
    """The Bridge's table of names, with the norms of layers that are not Transformer Engine's."""

    def mapping_registry(self: Any) -> MegatronMappingRegistry:
        known = own(self).mappings
        names = {m.megatron_param for m in known}
        added = [AutoMapping(ours, theirs) for ours, theirs in _NORMS.items() if ours not in names]
        return MegatronMappingRegistry(*known, *added)

    return mapping_registry


@contextmanager
def _norms_in_sequence_parallel() -> Iterator[None]:
    """The core refuses torch's norms there, whose weights' gradients it would have to sum up."""
    own = WrappedTorchNorm.__new__

    def made(cls: Any, config: Any, *args: Any, **options: Any) -> Any:
        split, config.sequence_parallel = config.sequence_parallel, False
        try:
            return own(cls, config, *args, **options)
        finally:
            config.sequence_parallel = split

    WrappedTorchNorm.__new__ = made  # type: ignore[method-assign]
    try:
        yield
    finally:
        WrappedTorchNorm.__new__ = own  # type: ignore[method-assign]
