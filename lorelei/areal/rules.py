"""The table: every key of AReaL's files, and what it becomes here.

docs/areal.md is made from it (`lorelei.areal.page`). A key without a rule takes that of
the section it stands in, where that has one; else it is refused.
"""

from __future__ import annotations

from lorelei.areal.engine_rules import ENGINES
from lorelei.areal.rule import Rule, copied, equal, ignored, made, only
from lorelei.areal.server_rules import SERVERS
from lorelei.areal.service_rules import BESIDE, DATA, EXAMPLES

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OWN = "the engines here have settings of their own; see `lorelei schema`"
_TRAIN = ("train.kind", "train.*_parallel")
_SAMPLE = ("rollout.kind", "rollout.replicas", "rollout.tensor_parallel_size")

RUN = (
    made("experiment_name", "name", why="with trial_name: NAME-TRIAL"),
    made("trial_name", "name", why="see experiment_name"),
    copied("seed", "seed", default=1),
    made(
        "total_train_epochs",
        "steps",
        default=1,
        why="epochs x (rows of the data set // train_dataset.batch_size)",
    ),
    made("total_train_steps", "steps", why="in place of the epochs"),
    only("total_train_n_seqs", None, why="steps are counted; set total_train_steps"),
    only("enable_offload", False, why="trainer and servers have devices of their own here"),
    equal("tokenizer_path", "actor.path", "the tokenizer is the model's own"),
    made("allocation_mode", *_SAMPLE, *_TRAIN, why="the older way of writing both backends"),
    copied("cluster.n_nodes", "machine.nodes"),
    made(
        "cluster.n_gpus_per_node",
        "machine.devices",
        why="what the backends take must be there; 0: CPUs",
    ),
    copied("cluster.fileroot", "runs_dir"),
    ignored("cluster.cluster_name", "machines are not named here"),
    *(
        ignored(f"cluster.name_resolve.{key}", "the controller knows its workers' addresses")
        for key in ("type", "nfs_record_root", "etcd3_addr", "ray_actor_name")
    ),
    copied("scheduler.type", "cluster.kind", why="local or ray; see `lorelei launch slurm`"),
    *(
        ignored(f"scheduler.{key}", "there is no scheduler service here")
        for key in (
            *("endpoint", "deploy_mode", "functioncall_service_domain", "reward_model_path"),
            *("reward_functioncall_config", "reward_functioncall_config.*"),
            "reward_model_service_url",
        )
    ),
    ignored("launcher.*", "what is launched follows from the backends"),
)

ROLLOUT = (
    made("rollout.backend", *_SAMPLE, why="d servers of t processes each"),
    copied("rollout.max_head_offpolicyness", "rollout.max_head_offpolicyness", default=0),
    copied("rollout.max_concurrent_rollouts", "rollout.max_concurrent", why="groups in flight"),
    equal(
        "rollout.consumer_batch_size",
        "train_dataset.batch_size",
        "a step trains on the groups it collects",
    ),
    equal("rollout.use_lora", "actor.use_lora", "else rollouts silently sample the base model"),
    equal("rollout.lora_name", "gconfig.lora_name", "one adapter has one name"),
    equal("rollout.tokenizer_path", "actor.path", "the tokenizer is the model's own"),
    only(
        "rollout.scheduling_strategy.type",
        "separation",
        why="trainer and servers have devices of their own here",
    ),
    ignored("rollout.scheduling_strategy.target", "see rollout.scheduling_strategy.type"),
    ignored("rollout.scheduling_strategy.fork", "see rollout.scheduling_strategy.type"),
    only("rollout.agent.agent_cls_path", None, "", why="set env: {kind: agent, path: FILE.py:FN}"),
    only(
        "rollout.agent.mode",
        "inline",
        "subproc",
        why="episodes are driven by `env`, not by clients",
    ),
    copied("rollout.agent.turn_discount", "algo.turn_discount", why="of each turn's reward"),
    only("rollout.agent.export_style", "individual", "concat", why="turns share prefixes anyway"),
    *(
        ignored(f"rollout.agent.{key}", "agents are `env` here, see docs/environments.md")
        for key in (
            *("admin_api_key", "tool_call_parser", "reasoning_parser", "chat_template_type"),
            *("engine_max_tokens", "subproc_max_workers", "session_timeout_seconds"),
            "set_reward_finish_timeout",
        )
    ),
    only("rollout.api_url", None, why="set rollout.urls to attach to servers that run"),
    only("rollout.return_routed_experts", False, why="the trainer routes tokens itself"),
    *(
        ignored(f"rollout.{key}", "servers are started, or attached to by rollout.urls")
        for key in ("model", "admin_api_key", "provider_api_key")
    ),
    ignored("rollout.queue_size", "rollouts in flight are bounded by staleness and max_concurrent"),
    ignored("rollout.dump_to_file", "rollouts.jsonl is always written"),
    ignored("rollout.enable_rollout_tracing", "rollouts.jsonl is always written"),
    ignored("rollout.check_trajectory_format", "what an environment returns is always checked"),
    ignored("rollout.deterministic_sampling", "sampling is keyed by seed, adapter and prompt"),
    ignored("rollout.schedule_policy", "replicas get work by load and prefix"),
    ignored("rollout.routing_strategy", "replicas get work by load and prefix"),
    *(
        ignored(f"rollout.{key}", "requests are retried and servers restarted as needed")
        for key in (
            *("setup_timeout", "workers_ready_timeout", "request_timeout", "request_retries"),
            *("pause_grace_period", "poll_interval"),
        )
    ),
    ignored("rollout._version", _OWN),
    copied("gconfig.n_samples", "rollout.n_samples", default=1),
    copied("gconfig.max_new_tokens", "rollout.max_new_tokens", default=16384),
    made(
        "gconfig.max_tokens",
        "rollout.max_context",
        why="the smaller of it and the server's own limit",
    ),
    copied("gconfig.temperature", "rollout.temperature", default=1.0),
    copied("gconfig.stop", "rollout.stop_strings"),
    made("gconfig.lora_name", "adapters", default="default_lora", why="the adapter's name"),
    only("gconfig.min_new_tokens", 0, why="answers of training end where the model ends them"),
    only("gconfig.greedy", False, why="greedy samples of a prompt are all the same"),
    *(
        only(f"gconfig.{key}", *off, why="log-probabilities must be those of the distribution")
        for key, off in (
            *(("top_p", (1.0, None)), ("top_k", (None, -1, 0, 100_000_000))),
            *(("frequency_penalty", (0.0,)), ("use_beam_search", (False,))),
        )
    ),
    only("gconfig.stop_token_ids", None, [], why="the model's own end tokens are used"),
    only("gconfig.ignore_eos", False, why="the model's own end tokens are used"),
    only("gconfig.reward_normalization", False, why="set actor.reward_norm"),
    ignored("gconfig.reward_normalization_use_std", "see gconfig.reward_normalization"),
    ignored("gconfig.drop_incomplete_group", "a failed rollout leaves its siblings to train on"),
    ignored("gconfig.skip_special_tokens", "text is decoded without them"),
    ignored("gconfig.seed", "sampling is keyed by seed, adapter and prompt"),
)

_EVAL = "evaluations here are of one answer to a prompt"
EVAL = (
    made("eval_gconfig.temperature", "eval.temperature", why="0 where eval_gconfig.greedy is true"),
    made("eval_gconfig.greedy", "eval.temperature", why="see eval_gconfig.temperature"),
    copied("eval_gconfig.max_new_tokens", "eval.max_new_tokens"),
    copied("eval_gconfig.top_p", "eval.top_p"),
    copied(
        "eval_gconfig.top_k", "eval.top_k", convert=lambda k: 0 if k in (-1, 100_000_000) else k
    ),
    only("eval_gconfig.n_samples", 1, why=_EVAL),
    only("eval_gconfig.min_new_tokens", 0, why=_EVAL),
    only("eval_gconfig.frequency_penalty", 0.0, why=_EVAL),
    only("eval_gconfig.use_beam_search", False, why=_EVAL),
    only("eval_gconfig.ignore_eos", False, why=_EVAL),
    only("eval_gconfig.stop_token_ids", None, [], why="the model's own end tokens are used"),
    equal("eval_gconfig.stop", "gconfig.stop", "completions end where training's do"),
    equal("eval_gconfig.lora_name", "gconfig.lora_name", "one adapter has one name"),
    *(
        ignored(f"eval_gconfig.{key}", "see gconfig")
        for key in ("max_tokens", "skip_special_tokens")
    ),
)

_LORA = (
    copied("actor.use_lora", "lora.use_lora", default=False),
    copied("actor.lora_rank", "lora.lora_rank", default=32),
    copied("actor.lora_alpha", "lora.lora_alpha", default=16),
    copied(
        "actor.target_modules",
        "lora.target_modules",
        default=(),
        convert=lambda names: list(names) or ["all-linear"],
        why="none: all-linear",
    ),
    copied("actor.peft_type", "lora.peft_type", default="lora"),
)
_OPTIMIZER = (
    only(
        "actor.optimizer.type",
        "adam",
        "adam_bf16",
        why="AdamW with float32 moments is what there is",
    ),
    copied("actor.optimizer.lr", "optimizer.lr", default=1e-3),
    copied("actor.optimizer.weight_decay", "optimizer.weight_decay", default=0.01),
    copied("actor.optimizer.beta1", "optimizer.beta1", default=0.9),
    copied("actor.optimizer.beta2", "optimizer.beta2", default=0.999),
    copied("actor.optimizer.eps", "optimizer.eps", default=1e-8),
    copied("actor.optimizer.lr_scheduler_type", "optimizer.lr_schedule", default="constant"),
    copied("actor.optimizer.gradient_clipping", "optimizer.gradient_clipping", default=1.0),
    made(
        "actor.optimizer.warmup_steps_proportion",
        "optimizer.warmup_steps",
        default=0.001,
        why="of steps, rounded down",
    ),
    made("actor.optimizer.warmup_steps", "optimizer.warmup_steps", why="in place of the share"),
    made("actor.optimizer.min_lr_ratio", "optimizer.min_lr_ratio", why="of linear and cosine"),
    only("actor.optimizer.offload", False, why="an adapter's optimizer is small"),
    *(
        ignored(f"actor.optimizer.{key}", "adapters and optimizer are float32")
        for key in ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis")
    ),
)
_LOSS = (
    copied("actor.ppo_n_minibatches", "algo.ppo_n_minibatches", default=4),
    copied("actor.eps_clip", "algo.eps_clip", default=0.2),
    copied("actor.eps_clip_higher", "algo.eps_clip_higher"),
    copied("actor.c_clip", "algo.c_clip"),
    copied("actor.kl_ctl", "algo.kl_ctl", default=0.1),
    made(
        "actor.kl_estimator",
        *("algo.kl_estimator", "algo.use_kl_in_reward"),
        default="k1",
        why="with kl_ctl above 0, which needs a `ref`; subtracted from the rewards of tokens",
    ),
    made(
        "actor.recompute_logprob",
        "algo.recompute_logprob",
        default=False,
        why="implied by use_decoupled_loss",
    ),
    made(
        "actor.use_decoupled_loss",
        "algo.use_decoupled_loss",
        default=False,
        why="without rejection_sampling there is no weight there: recompute_logprob alone",
    ),
    copied("actor.rejection_sampling.upper", "algo.rejection_sampling.upper"),
    copied("actor.rejection_sampling.lower", "algo.rejection_sampling.lower"),
    copied("actor.rejection_sampling.metric", "algo.rejection_sampling.metric"),
    copied("actor.rejection_sampling.level", "algo.rejection_sampling.level"),
    copied("actor.rejection_sampling.action", "algo.rejection_sampling.action"),
    copied("actor.rejection_sampling.agg", "algo.rejection_sampling.agg", why="of level: sequence"),
    *(
        copied(f"actor.{key}", "algo.rejection_sampling.upper", why="of older files")
        for key in ("behave_imp_weight_cap", "behav_imp_weight_cap")
    ),
    only(
        "actor.prox_logp_method", "recompute", objective="an approximation of the proximal policy"
    ),
    made("actor.importance_sampling_level", "algo.kind", why="sequence: gspo"),
    copied("actor.m2_threshold", "algo.m2_threshold", why="with use_decoupled_loss: m2po"),
    made("actor.use_sapo_loss", "algo.kind", why="true: sapo"),
    copied("actor.sapo_tau_pos", "algo.tau_pos", default=1.0),
    copied("actor.sapo_tau_neg", "algo.tau_neg", default=1.05),
    only(
        "actor.use_cispo_loss",
        False,
        why="set algo.kind=cispo, whose bounds are algo.eps_clip and algo.eps_clip_higher",
    ),
    copied("actor.dynamic_sampling", "algo.drop_zero_variance_groups"),
)
_STATISTIC = "deviations are around the mean that is subtracted"
_UNBIASED = "AReaL's default: true"
_EPS = "AReaL's default: 1e-05"
_COUNTED = {
    "reward_norm": "null: none; weigh_by: rollout",
    "adv_norm": "null: none; weigh_by: token, as its statistics there are of tokens",
}
_REWARD = (
    copied("actor.reward_scaling", "algo.reward_scaling", default=1.0),
    copied("actor.reward_bias", "algo.reward_bias", default=0.0),
    copied("actor.reward_clip", "algo.reward_clip", default=20.0),
    *(
        rule
        for norm in ("reward_norm", "adv_norm")
        for rule in (
            made(f"actor.{norm}", f"algo.{norm}", why=_COUNTED[norm]),
            made(f"actor.{norm}.mean_level", f"algo.{norm}.mean_level", why="null: none"),
            made(f"actor.{norm}.std_level", f"algo.{norm}.std_level", why="null: none"),
            equal(f"actor.{norm}.group_size", "gconfig.n_samples", "a group is of one prompt"),
            made(f"actor.{norm}.mean_leave1out", f"algo.{norm}.mean_leave1out", why=_STATISTIC),
            made(f"actor.{norm}.std_unbiased", f"algo.{norm}.std_unbiased", why=_UNBIASED),
            made(f"actor.{norm}.eps", f"algo.{norm}.eps", why=_EPS),
        )
    ),
    only("actor.discount", 1.0, why="an answer has one reward"),
    only("actor.gae_lambda", 1.0, why="an answer has one reward"),
    only("actor.gae_timestep_unit", "token", why="an answer has one reward"),
    made("actor.overlong_reward_penalty", "algo.overlong_penalty", why="below rollout's limit"),
    made("actor.overlong_tokens", "algo.overlong_penalty.buffer", why="of overlong_reward_penalty"),
    made(
        "actor.overlong_penalty_factor",
        "algo.overlong_penalty.factor",
        why="of overlong_reward_penalty",
    ),
    only("actor.mask_no_eos_with_zero", False, why="answers that were cut off are trained on"),
    ignored("actor.min_usable_group_size", "a failed rollout leaves its siblings to train on"),
    ignored("actor.log_agent_stats", "metrics.jsonl has what a reward reports"),
    ignored("actor.log_agent_stats_keys", "metrics.jsonl has what a reward reports"),
)
ACTOR = (
    made("actor.backend", *_TRAIN, why="an engine and its sizes"),
    copied("actor.path", "model"),
    copied("actor.dtype", "dtype", default="bfloat16", convert=lambda name: DTYPES.get(name, name)),
    copied("actor.gradient_checkpointing", "train.gradient_checkpointing", default=False),
    copied("actor.mb_spec.max_tokens_per_mb", "train.max_tokens_per_mb"),
    *(
        ignored(f"actor.mb_spec.{key}", "micro-batches are filled up to max_tokens_per_mb")
        for key in ("n_mbs", "granularity", "n_mbs_divisor", "packing_algorithm")
    ),
    copied("actor.weight_update_mode", "publish.kind", default="xccl"),
    *(*_LORA, *_OPTIMIZER, *_LOSS, *_REWARD),
    equal("actor.temperature", "gconfig.temperature", "the loss needs the sampler's temperature"),
    equal("actor.max_new_tokens", "gconfig.max_new_tokens", "the trainer reads what was sampled"),
    equal("actor.group_size", "gconfig.n_samples", "a group is of one prompt"),
    only("actor.init_from_scratch", False, why="adapters are trained on a pre-trained model"),
    only("actor.is_critic", False, why="there is no critic"),
    only("actor.offload", False, why="trainer and servers have devices of their own here"),
    only("actor.scheduling_strategy.type", "separation", why="see enable_offload"),
    ignored("actor.scheduling_strategy.target", "see actor.scheduling_strategy.type"),
    ignored("actor.scheduling_strategy.fork", "see actor.scheduling_strategy.type"),
    ignored("actor.disable_dropout", "the models have none; lora.lora_dropout is 0"),
    ignored("actor.attn_impl", "the train engine chooses its attention"),
    ignored("actor.use_kernels", "the train engine chooses its kernels"),
    ignored("actor.grad_reduce_dtype", "adapters and optimizer are float32"),
    ignored("actor.optimizer_dtype", "adapters and optimizer are float32"),
    ignored("actor.pad_to_maximum", "batches are packed, without padding"),
    ignored("actor.logprobs_chunk_size", "logits are computed in chunks anyway"),
    ignored("actor.enable_tree_training", "what samples share is computed once anyway"),
    *(
        ignored(f"actor.{key}", _OWN)
        for key in ("_version", "request_timeout", "setup_timeout", "admin_api_key", "log_level")
    ),
    equal("ref.path", "actor.path", "the reference is the base model with the adapter off"),
    ignored("ref.*", "the reference is the base model with the adapter off: no second model"),
)

REFUSED = (
    only("critic.*", None, objective="PPO with a critic"),
    only("teacher.*", None, objective="distillation from a teacher"),
    only("actor.beta", None, objective="DPO"),
    only("actor.loss_type", None, objective="DPO"),
    only("dynamic_bs", False, why="a step takes batch_size groups; see actor.dynamic_sampling"),
)

RULES: tuple[Rule, ...] = (
    *(*RUN, *ROLLOUT, *EVAL, *ACTOR, *ENGINES, *SERVERS, *DATA, *BESIDE, *REFUSED, *EXAMPLES),
)
