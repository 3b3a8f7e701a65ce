"""The part of the table about the sections sglang and vllm."""

from __future__ import annotations

from lorelei.areal.rule import equal, ignored, made, only

_FOLLOWS = "follows from the run"
_OPTION = "an option of the server, by the server's name"
_SMALLER = "the smaller of it and gconfig.max_tokens"
_KEYED = "sampling is keyed by seed, adapter and prompt"

SERVERS = (
    equal("sglang.model_path", "actor.path", "servers sample the model that is trained"),
    equal("sglang.dtype", "actor.dtype", "servers sample the model that is trained"),
    equal("sglang.enable_lora", "actor.use_lora", "else rollouts silently sample the base model"),
    made(
        "sglang.max_lora_rank",
        "rollout.reserve_rank",
        why="where it is above actor.lora_rank; refused below it",
    ),
    made("sglang.max_loaded_loras", why="max_head_offpolicyness + 2 versions must have room"),
    made(
        "sglang.context_length",
        "rollout.max_context",
        why=_SMALLER,
    ),
    made(
        "sglang.max_running_requests",
        "rollout.max_running",
        why="null: a server's share of max_concurrent_rollouts x n_samples",
    ),
    only("sglang.dp_size", 1, why="replicas are the d of rollout.backend"),
    only("sglang.ep_size", 1, why="experts are not spread over a server's processes"),
    ignored("sglang.random_seed", _KEYED),
    *(
        ignored(f"sglang.{key}", _FOLLOWS)
        for key in (
            *("skip_tokenizer_init", "enable_memory_saver", "sampling_backend", "log_level_http"),
            *("lora_paths", "lora_target_modules", "max_loras_per_batch", "load_format"),
        )
    ),
    *(
        made(f"sglang.{key}", "rollout.extra_args", why=_OPTION)
        for key in (
            *("disable_cuda_graph", "disable_radix_cache", "disable_cuda_graph_padding"),
            *("enable_nccl_nvls", "disable_outlines_disk_cache", "disable_custom_all_reduce"),
            *("disable_overlap_schedule", "enable_mixed_chunk", "enable_dp_attention"),
            *("enable_ep_moe", "enable_torch_compile", "torch_compile_max_bs"),
            *("cuda_graph_max_bs", "cuda_graph_bs", "torchao_config", "enable_nan_detection"),
            *("enable_p2p_check", "triton_attention_reduce_in_fp32"),
            *("triton_attention_num_kv_splits", "num_continuous_decode_steps"),
            *("allow_auto_truncate", "attention_backend", "enable_multimodal"),
            *("mem_fraction_static", "chunked_prefill_size", "max_prefill_tokens"),
            *("schedule_policy", "schedule_conservativeness", "cpu_offload_gb"),
            *("kv_cache_dtype", "lora_backend", "log_level", "log_requests"),
            *("log_requests_level", "show_time_cost", "enable_metrics", "decode_log_interval"),
        )
    ),
    ignored("sglang.enable_multithread_load", "an option of AReaL's own launcher"),
    ignored("sglang.enable_return_routed_experts", "see rollout.return_routed_experts"),
    made("sglang.*", "rollout.extra_args", why=_OPTION),
    equal("vllm.model", "actor.path", "servers sample the model that is trained"),
    equal("vllm.dtype", "actor.dtype", "servers sample the model that is trained"),
    equal("vllm.enable_lora", "actor.use_lora", "else rollouts silently sample the base model"),
    made(
        "vllm.max_lora_rank",
        "rollout.reserve_rank",
        why="where it is above actor.lora_rank; refused below it",
    ),
    made("vllm.max_loras", why="max_head_offpolicyness + 2 versions must have room"),
    made("vllm.max_model_len", "rollout.max_context", why=_SMALLER),
    made("vllm.max_num_seqs", "rollout.max_running", default=256, why="sequences at once"),
    ignored("vllm.seed", _KEYED),
    *(
        ignored(f"vllm.{key}", _FOLLOWS)
        for key in (
            *("skip_tokenizer_init", "enable_sleep_mode", "worker_extension_cls", "lora_modules"),
            *("uvicorn_log_level", "distributed_executor_backend"),
        )
    ),
    *(
        made(f"vllm.{key}", "rollout.extra_args", why=_OPTION)
        for key in (
            *("enforce_eager", "block_size", "cpu_offload_gb", "disable_sliding_window"),
            *("no_enable_chunked_prefill", "no_enable_prefix_caching", "gpu_memory_utilization"),
        )
    ),
    made("vllm.*", "rollout.extra_args", why=_OPTION),
)
