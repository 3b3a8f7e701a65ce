"""The part of the table about data, what goes on beside training, and what repeats anywhere."""

from __future__ import annotations

from lorelei.areal.rule import Rule, copied, ignored, made, only, own

_LAUNCHED = "what is launched follows from the backends"
_SAVED = "adapters are saved every step; `lorelei export` writes one for others"
_COMMITTED = "a step is committed or it did not happen; `lorelei resume` goes on"
_SECONDS = "metrics.jsonl has the seconds of every part of a step"
_TRACKER = "metrics.jsonl and `lorelei report`; there is no tracker yet"
_READER = "it is for the Python code that reads the data there"
_RENDERED = "prompts are rendered before the first step"
_HELD_OUT = "eval.n_prompts problems of the training data are held out"

DATA = (
    made(
        "train_dataset.path", "task", "reward", why="openai/gsm8k and math_verify; else give both"
    ),
    made(
        "train_dataset.type",
        "algo.kind",
        why="rl: grpo; sft: sft, whose rows are rendered as chats; nothing else is built yet",
    ),
    made("train_dataset.split", "task.split", default="train", why="of openai/gsm8k"),
    copied("train_dataset.batch_size", "algo.batch_size", default=1),
    made(
        "train_dataset.max_length",
        "task.max_prompt_tokens",
        "task.long_prompts",
        why="longer prompts are left out: drop",
    ),
    only("train_dataset.drop_last", True, why="every step has a whole batch"),
    only("train_dataset.shuffle", True, why="the order is always a seeded permutation"),
    only("train_dataset.dataset_kwargs", None, {}, why=_READER),
    only("train_dataset.dataset_kwargs.*", None, why=_READER),
    made("valid_dataset.path", why=f"{_HELD_OUT}; other data is refused"),
    *(
        ignored(f"{data}.{key}", _RENDERED)
        for data in ("train_dataset", "valid_dataset")
        for key in ("pin_memory", "num_workers", "num_dataset_workers", "setup_timeout")
    ),
    *(
        ignored(f"valid_dataset.{key}", _HELD_OUT)
        for key in (
            *("split", "type", "batch_size", "shuffle", "drop_last", "max_length"),
            "dataset_kwargs.*",
        )
    ),
    made("evaluator.freq_epochs", "eval.every", why="epochs x steps of one; null: never"),
    made("evaluator.freq_steps", "eval.every", why="in place of the epochs"),
    ignored("evaluator.freq_secs", "evaluations are counted in steps"),
    only("evaluator.eval_before_train", False, why="use `lorelei eval RUN --base`"),
)

BESIDE = (
    *(ignored(f"saver.{k}", _SAVED) for k in ("freq_epochs", "freq_steps", "freq_secs", "mode")),
    *(
        ignored(f"recover.{key}", _COMMITTED)
        for key in (
            *("mode", "freq_epochs", "freq_steps", "freq_secs", "retries"),
            *("no_save_optim", "no_load_optim"),
        )
    ),
    *(
        ignored(f"stats_logger.wandb.{key}", _TRACKER)
        for key in (
            *("mode", "wandb_base_url", "wandb_api_key", "entity", "project", "name", "job_type"),
            *("group", "notes", "tags", "config", "config.*", "id_suffix"),
        )
    ),
    *(
        ignored(f"stats_logger.swanlab.{key}", _TRACKER)
        for key in ("project", "name", "config", "config.*", "logdir", "mode", "api_key")
    ),
    ignored("stats_logger.tensorboard.path", _TRACKER),
    *(
        ignored(f"stats_logger.trackio.{key}", _TRACKER)
        for key in ("mode", "project", "name", "space_id")
    ),
    *(ignored(f"perf_tracer.{k}", _SECONDS) for k in ("enabled", "save_interval", "profile_steps")),
    *(
        ignored(f"perf_tracer.session_tracer.{key}", _SECONDS)
        for key in ("enabled", "flush_threshold")
    ),
    *(
        ignored(f"memory_profiler.{key}", "use `lorelei plan`")
        for key in ("profile_steps", "max_entries")
    ),
)

# Sections and keys that no option class has: examples add them in classes of their own, for Python
# code that lies beside them.
EXAMPLES = (
    *(
        own(key, "env")
        for key in (
            *("workflow", "eval_workflow", "agent_run_args", "agent_builder_path", "econfig"),
            *("tir", "judge_engine", "max_turns", "n_trajs", "max_llm_calls_per_run"),
            *("max_tokens_per_trajectory", "export_style"),
        )
    ),
    own("reward_fn_path", "reward"),
    *(own(key, "") for key in ("async_training", "model_path", "log_agent_stats")),
)

_SPEC = (
    *("cpu", "gpu", "mem", "port_count", "image", "task_type", "env_vars", "cmd"),
    *("srun_additional_args", "additional_bash_cmds", "container_type", "mount", "nodelist"),
    *("exclude", "ray_placement_strategy"),
)

# keys of many sections, by their ends
REPEATED: dict[str, Rule] = {
    "experiment_name": ignored("experiment_name", "a run has one name and one folder"),
    "trial_name": ignored("trial_name", "a run has one name and one folder"),
    "fileroot": ignored("fileroot", "a run is one folder: runs_dir/name"),
    "scheduling_spec": ignored("scheduling_spec", _LAUNCHED),
    **{f"scheduling_spec.{k}": ignored(f"scheduling_spec.{k}", _LAUNCHED) for k in _SPEC},
}
