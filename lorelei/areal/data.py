"""The data set of an AReaL file: the task, the reward, and how long the run is."""

from __future__ import annotations

from lorelei.areal.file import ArealFile, rule_of
from lorelei.config.errors import ConfigError, shown
from lorelei.config.section import Raw

GSM8K = "openai/gsm8k"
GSM8K_ROWS = 7473  # of its split train
WITH_IMAGES = ("clevr_count_70k", "geometry3k", "virl39k")
IMAGES = "images"  # in `missing`
# what AReaL's own code asks
PROMPT = "{question}\nPlease put your final answer within \\boxed{{}}."


def data_sections(file: ArealFile, config: Raw, missing: dict[str, str]) -> None:
    """Put task, reward, steps and eval into `config`, or why not into `missing`."""
    path = str(file.value("train_dataset.path", ""))
    name = path.rstrip("/").rpartition("/")[2]
    known = name == "gsm8k"
    limit = Raw()
    if longest := file.number("train_dataset.max_length"):
        limit = {"max_prompt_tokens": longest, "long_prompts": "drop"}
    config.pop("task", None)
    if known:
        asks = {} if file.sft else {"prompt_template": PROMPT}
        split = file.value("train_dataset.split", "train")
        config["task"] = {"kind": "hf", "path": path, "name": "main", "split": split} | asks | limit
        if not file.sft:
            config["reward"] = {"kind": "math_verify"}
    else:
        words = f"train_dataset.path: {shown(path)} is read and scored by Python code of AReaL's"
        missing["task"] = f"{words}; give task={{kind: jsonl, path: ...}}"
        if not file.sft:
            missing["reward"] = f"{words}; give reward={{kind: math_verify}} or another"
    if name in WITH_IMAGES:
        missing[IMAGES] = (
            f"train_dataset.path: {shown(path)} has images, and models read only text here; give "
            "task={kind: jsonl, path: ...} and actor.path=MODEL of text"
        )
    epoch = GSM8K_ROWS // file.number("train_dataset.batch_size", 1) if known else None
    if epoch == 0:
        raise ConfigError(
            f"train_dataset.batch_size: {file.value('train_dataset.batch_size')} is more than the "
            f"{GSM8K_ROWS} rows of {GSM8K}; lower it"
        )
    _steps(file, epoch, config, missing)
    _evaluation(file, epoch, config, missing)


def own_sections(file: ArealFile, missing: dict[str, str]) -> None:
    """What the keys of an example's own class say in Python, into `missing`."""
    for key, value in file.values.items():
        rule = rule_of(key)
        if rule is None or rule.how != "own" or not rule.ours or value is None:
            continue
        (ours,), top = rule.ours, key.partition(".")[0]
        example = {"env": "{kind: agent, path: FILE.py:FN}", "reward": "{kind: math_verify}"}[ours]
        alone = "" if ours == "reward" else f", or {top}=null for single answers"
        missing.setdefault(
            ours, f"{key}: {shown(value)} is {rule.why}; give {ours}={example}{alone}"
        )


def _steps(file: ArealFile, epoch: int | None, config: Raw, missing: dict[str, str]) -> None:
    """epoch: steps of one."""
    if (steps := file.number("total_train_steps")) is not None:
        config["steps"] = steps
    elif epoch is not None:
        config["steps"] = file.number("total_train_epochs", 1) * epoch
    else:
        missing["steps"] = (
            f"total_train_epochs: {file.number('total_train_epochs', 1)} of data whose size is not "
            "known before it is read; give steps=..., or total_train_steps in the file"
        )
        return
    if (warm := file.number("actor.optimizer.warmup_steps")) is not None:
        config["optimizer"]["warmup_steps"] = warm
        return
    share = file.number("actor.optimizer.warmup_steps_proportion", 0.001)
    config["optimizer"]["warmup_steps"] = int(share * config["steps"])


def _evaluation(file: ArealFile, epoch: int | None, config: Raw, missing: dict[str, str]) -> None:
    epochs, steps = (file.number(f"evaluator.freq_{unit}") for unit in ("epochs", "steps"))
    held_out, trained = (file.value(f"{data}.path") for data in ("valid_dataset", "train_dataset"))
    section = config.setdefault("eval", {})
    if epochs is None and steps is None:
        section["every"] = 0
    elif held_out not in (None, trained):
        del config["eval"]
        missing["eval"] = (
            f"valid_dataset.path: {shown(held_out)} is other data than {shown(trained)}, of which "
            "problems are held out here; give eval.every=..., 0 for never"
        )
    elif steps is not None:
        section["every"] = steps
    elif epoch is not None and epochs is not None:
        section["every"] = epoch * epochs
    else:
        del config["eval"]
        missing["eval"] = (
            f"evaluator.freq_epochs: {epochs} of data whose size is not known before it is read; "
            "give eval.every=..., or evaluator.freq_steps in the file"
        )
