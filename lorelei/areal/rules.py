"""The table: every key of AReaL's files, and what it becomes here.

docs/areal.md is made from it (`lorelei.areal.page`). A key without a rule takes that of
the section it stands in, where that has one; else it is refused.
"""

from __future__ import annotations

from lorelei.areal.rule import Rule, copied, equal, ignored, made, only
from lorelei.areal.server_rules import SERVERS

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_ONE_RUN = "a run has one name and one folder"
_FOLDER = "a run is one folder: runs_dir/name"
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
    copied(
        "cluster.n_gpus_per_node", "machine.devices", why="what the backends take must be there"
    ),
    copied("cluster.fileroot", "runs_dir"),
    ignored("cluster.cluster_name", "machines are not named here"),
    ignored("cluster.name_resolve.*", "the controller knows its workers' addresses"),
    copied("scheduler.type", "cluster.kind", why="local or ray; see `lorelei launch slurm`"),
    ignored("scheduler.*", "there is no scheduler service here"),
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
    ignored("rollout.scheduling_strategy.*", "see rollout.scheduling_strategy.type"),
    only("rollout.agent.agent_cls_path", None, "", why="set env: {kind: agent, path: FILE.py:FN}"),
    only("rollout.agent.mode", "inline", why="agents are `env: {kind: agent}` here"),
    only("rollout.agent.turn_discount", 1.0, why="set env.turn_discount"),
    only("rollout.agent.export_style", "individual", "concat", why="turns share prefixes anyway"),
    ignored("rollout.agent.*", "agents are `env` here, see docs/environments.md"),
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
    ignored("rollout.scheduling_spec", "what is launched follows from the backends"),
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
    made("actor.megatron.bridge_type", why="must be megatron-bridge for LoRA"),
)
_OPTIMIZER = (
    only("actor.optimizer.type", "adam", why="AdamW is what there is"),
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
    only("actor.optimizer.min_lr_ratio", 0.0, why="schedules fall to zero here"),
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
    only("actor.c_clip", None, why="there is no dual clipping"),
    copied("actor.kl_ctl", "algo.kl_ctl", default=0.1),
    only("actor.kl_estimator", "k3", "k1", why="k3 is what there is; it matters with kl_ctl only"),
    made(
        "actor.recompute_logprob",
        "algo.recompute_logprob",
        default=False,
        why="implied by use_decoupled_loss",
    ),
    copied("actor.use_decoupled_loss", "algo.use_decoupled_loss", default=False),
    copied("actor.rejection_sampling.upper", "algo.rejection_sampling.upper"),
    copied("actor.rejection_sampling.lower", "algo.rejection_sampling.lower"),
    copied("actor.rejection_sampling.metric", "algo.rejection_sampling.metric"),
    only("actor.rejection_sampling.level", "token", why="tokens are judged one by one"),
    only("actor.rejection_sampling.action", "mask", why="tokens are left out, not clamped"),
    only("actor.rejection_sampling.agg", "mean", why="tokens are judged one by one"),
    *(
        copied(f"actor.{key}", "algo.rejection_sampling.upper", why="of older files")
        for key in ("behave_imp_weight_cap", "behav_imp_weight_cap")
    ),
    only("actor.prox_logp_method", "recompute", why="they are computed, not approximated"),
    only("actor.importance_sampling_level", "token", why="ratios are of tokens"),
    only("actor.m2_threshold", None, why="there is no M2PO"),
    only("actor.use_sapo_loss", False, why="there is no SAPO"),
    only("actor.use_cispo_loss", False, why="there is no CISPO"),
    *(ignored(f"actor.{k}", "see actor.use_sapo_loss") for k in ("sapo_tau_pos", "sapo_tau_neg")),
    copied("actor.dynamic_sampling", "algo.drop_zero_variance_groups"),
)
_REWARD = (
    copied("actor.reward_scaling", "algo.reward_scaling", default=1.0),
    copied("actor.reward_bias", "algo.reward_bias", default=0.0),
    made("actor.reward_clip", default=20.0, why="refused where a score of 0 to 1 could reach it"),
    *(
        rule
        for norm in ("reward_norm", "adv_norm")
        for rule in (
            made(f"actor.{norm}", f"algo.{norm}", why="null: none"),
            made(f"actor.{norm}.mean_level", f"algo.{norm}.mean_level", why="null: none"),
            made(f"actor.{norm}.std_level", f"algo.{norm}.std_level", why="null: none"),
            equal(f"actor.{norm}.group_size", "gconfig.n_samples", "a group is of one prompt"),
            only(f"actor.{norm}.mean_leave1out", False, why="set algo.kind: rloo"),
            ignored(f"actor.{norm}.std_unbiased", "deviations are those of `algo`"),
            ignored(f"actor.{norm}.eps", "deviations are those of `algo`"),
        )
    ),
    only("actor.discount", 1.0, why="an answer has one reward"),
    only("actor.gae_lambda", 1.0, why="an answer has one reward"),
    only("actor.gae_timestep_unit", "token", why="an answer has one reward"),
    only("actor.overlong_reward_penalty", False, why="write it into a reward of kind python"),
    ignored("actor.overlong_tokens", "see actor.overlong_reward_penalty"),
    ignored("actor.overlong_penalty_factor", "see actor.overlong_reward_penalty"),
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
    ignored("actor.mb_spec.*", "micro-batches are filled up to max_tokens_per_mb"),
    copied("actor.weight_update_mode", "publish.kind", default="xccl"),
    *(*_LORA, *_OPTIMIZER, *_LOSS, *_REWARD),
    equal("actor.temperature", "gconfig.temperature", "the loss needs the sampler's temperature"),
    equal("actor.max_new_tokens", "gconfig.max_new_tokens", "the trainer reads what was sampled"),
    equal("actor.group_size", "gconfig.n_samples", "a group is of one prompt"),
    only("actor.init_from_scratch", False, why="adapters are trained on a pre-trained model"),
    only("actor.is_critic", False, why="there is no critic"),
    only("actor.offload", False, why="trainer and servers have devices of their own here"),
    only("actor.scheduling_strategy.type", "separation", why="see enable_offload"),
    ignored("actor.scheduling_strategy.*", "see actor.scheduling_strategy.type"),
    ignored("actor.disable_dropout", "the models have none; lora.lora_dropout is 0"),
    ignored("actor.attn_impl", "the train engine chooses its attention"),
    ignored("actor.use_kernels", "the train engine chooses its kernels"),
    ignored("actor.grad_reduce_dtype", "adapters and optimizer are float32"),
    ignored("actor.optimizer_dtype", "adapters and optimizer are float32"),
    ignored("actor.pad_to_maximum", "batches are packed, without padding"),
    ignored("actor.logprobs_chunk_size", "logits are computed in chunks anyway"),
    ignored("actor.enable_tree_training", "what samples share is computed once anyway"),
    ignored("actor.scheduling_spec", "what is launched follows from the backends"),
    *(ignored(f"actor.{engine}.*", _OWN) for engine in ("fsdp", "megatron", "archon")),
    *(ignored(f"actor.{key}", _OWN) for key in ("_version", "request_timeout", "setup_timeout")),
    equal("ref.path", "actor.path", "the reference is the base model with the adapter off"),
    ignored("ref.*", "the reference is the base model with the adapter off: no second model"),
)

DATA = (
    made(
        "train_dataset.path", "task", "reward", why="openai/gsm8k and math_verify; else give both"
    ),
    copied("train_dataset.batch_size", "algo.batch_size", default=1),
    copied(
        "train_dataset.max_length",
        "task.max_prompt_tokens",
        why="a longer prompt is an error here, AReaL leaves it out",
    ),
    only("train_dataset.type", "rl", why="write `algo: {kind: sft}` in a file of ours"),
    only("train_dataset.drop_last", True, why="every step has a whole batch"),
    ignored("train_dataset.shuffle", "the order is a seeded permutation"),
    *(
        ignored(f"{data}.{key}", "prompts are rendered before the first step")
        for data in ("train_dataset", "valid_dataset")
        for key in ("pin_memory", "num_workers")
    ),
    equal("valid_dataset.path", "train_dataset.path", "problems of the same data are held out"),
    ignored("valid_dataset.*", "eval.n_prompts problems of the training data are held out"),
    made("evaluator.freq_epochs", "eval.every", why="epochs x steps of one; null: never"),
    made("evaluator.freq_steps", "eval.every", why="in place of the epochs"),
    ignored("evaluator.freq_secs", "evaluations are counted in steps"),
    only("evaluator.eval_before_train", False, why="use `lorelei eval RUN --base`"),
    ignored("saver.*", "adapters are saved every step; `lorelei export` writes one for others"),
    ignored("recover.*", "a step is committed or it did not happen; `lorelei resume` goes on"),
    ignored("stats_logger.*", "metrics.jsonl and `lorelei report`; there is no tracker yet"),
    ignored("perf_tracer.*", "metrics.jsonl has the seconds of every part of a step"),
)

REFUSED = (
    only("critic.*", None, why="GRPO has no critic"),
    only("teacher.*", None, why="there is no distillation"),
)

NAMES = ("experiment_name", "trial_name", "fileroot")  # repeated in every section

RULES: tuple[Rule, ...] = (*RUN, *ROLLOUT, *ACTOR, *SERVERS, *DATA, *REFUSED)
REPEATED = {name: ignored(name, _ONE_RUN if name != "fileroot" else _FOLDER) for name in NAMES}
