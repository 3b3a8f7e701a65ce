"""The part of the table about the train engines' own sections; only the chosen one's are read."""

from __future__ import annotations

from lorelei.areal.rule import copied, ignored, made, only

_OWN = "the engine here has settings of its own; see `lorelei schema`"
_RECOMPUTE = "see actor.gradient_checkpointing"
_FLOAT32 = "adapters and optimizer are float32"
_SMALL = "an adapter's optimizer is small"
_FP8 = "weights and products are of actor.dtype; there is no fp8 training"
_SEE_FP8 = "see fp8_config.mode"

FSDP = (
    copied("actor.fsdp.offload_params", "train.cpu_offload", why="of the frozen base"),
    ignored("actor.fsdp.wrap_policy.transformer_layer_cls_to_wrap", "decoder layers are wrapped"),
    ignored("actor.fsdp.memory_efficient_load", "a process reads its own shards"),
    ignored("actor.fsdp.per_layer_optim_step", _SMALL),
    ignored("actor.fsdp.optim_step_prefetch_layers", _SMALL),
    ignored("actor.fsdp.shard_vision_across_sp", "models read text only"),
)

ARCHON = (
    ignored("actor.archon.attn_type", "what samples share is computed once anyway"),
    only("actor.archon.offload_params", False, why="fsdp has it, see actor.backend"),
    only("actor.archon.fp8_config.mode", "disabled", why=_FP8),
    *(
        ignored(f"actor.archon.fp8_config.{key}", _SEE_FP8)
        for key in ("exclude_modules", "include_experts", "use_triton")
    ),
    *(
        ignored(f"actor.archon.{key}", _RECOMPUTE)
        for key in (
            *("ac_mode", "selective_ac_option", "ac_memory_budget", "ac_preserve_rng_state"),
            "ac_debug",
        )
    ),
    *(
        ignored(f"actor.archon.{key}", "archon has no pipeline here")
        for key in (
            *("pp_schedule", "pp_layers_per_stage"),
            *("pp_first_stage_less_layers", "pp_last_stage_less_layers"),
        )
    ),
    *(
        ignored(f"actor.archon.{key}", _OWN)
        for key in (
            *("enable_compile", "reshard_after_forward_policy", "use_deterministic_algorithms"),
            "moe_router_dtype",
        )
    ),
)

MEGATRON = (
    made("actor.megatron.bridge_type", default="mbridge", why="must be megatron-bridge for LoRA"),
    copied("actor.megatron.ddp.use_distributed_optimizer", "train.distributed_optimizer"),
    only("actor.megatron.ddp.fp8_param_gather", False, why=_FP8),
    *(
        ignored(f"actor.megatron.ddp.{key}", _OWN)
        for key in (
            *("grad_reduce_in_fp32", "overlap_grad_reduce", "overlap_param_gather"),
            *("align_param_gather", "check_for_nan_in_grad", "bucket_size"),
            "average_in_collective",
        )
    ),
    only("actor.megatron.fp8_config.mode", None, why=_FP8),
    *(
        ignored(f"actor.megatron.fp8_config.{key}", _SEE_FP8)
        for key in (
            *("recipe", "param", "margin", "amax_history_len", "amax_compute_algo", "wgrad"),
            *("dot_product_attention", "multi_head_attention", "tp_only_amax_red"),
            *("first_last_layers_bf16", "num_layers_at_start_in_bf16"),
            *("num_layers_at_end_in_bf16", "direct_convert"),
        )
    ),
    *(
        ignored(f"actor.megatron.{key}", _RECOMPUTE)
        for key in (
            *("recompute_granularity", "recompute_method", "recompute_num_layers"),
            *("recompute_modules", "distribute_saved_activations"),
        )
    ),
    *(
        ignored(f"actor.megatron.{key}", _FLOAT32)
        for key in (
            *("use_precision_aware_optimizer", "main_grads_dtype", "main_params_dtype"),
            *("exp_avg_dtype", "exp_avg_sq_dtype"),
        )
    ),
    *(
        ignored(f"actor.megatron.{key}", "adapters are saved by the controller")
        for key in ("async_save", "use_checkpoint_opt_param_scheduler", "use_mbridge_save")
    ),
    *(
        ignored(f"actor.megatron.{key}", _OWN)
        for key in (
            *("wrap_with_ddp", "use_torch_fsdp2", "use_custom_fsdp"),
            *("virtual_pipeline_parallel_size", "overlap_param_gather_with_optimizer_step"),
            *("use_deterministic_algorithms", "moe_router_dtype", "moe_shared_expert_overlap"),
            *("moe_enable_deepep", "moe_token_dispatcher_type", "moe_permute_fusion"),
        )
    ),
)

ENGINES = (*FSDP, *ARCHON, *MEGATRON)
