"""The data set of an AReaL file: the task, the reward, and how long the run is."""

from __future__ import annotations

from lorelei.areal.file import ArealFile
from lorelei.config.errors import ConfigError, shown
from lorelei.config.section import Raw

GSM8K = "openai/gsm8k"
GSM8K_ROWS = 7473  # of its split train
# what AReaL's own code asks
PROMPT = "{question}\nPlease put your final answer within \\boxed{{}}."


def data_sections(file: ArealFile, config: Raw, missing: dict[str, str]) -> None:
    """Put task, reward, steps and eval into `config`, or why not into `missing`."""
    path = str(file.value("train_dataset.path", ""))
    known = path.rstrip("/").rpartition("/")[2] == "gsm8k"
    limit = {"max_prompt_tokens": n} if (n := file.number("train_dataset.max_length")) else {}
    config.pop("task", None)
    if known:
        config["task"] = {
            "kind": "hf",
            "path": path,
            "name": "main",
            "split": "train",
            "prompt_template": PROMPT,
            **limit,
        }
        config["reward"] = {"kind": "math_verify"}
    else:
        words = f"train_dataset.path: {shown(path)} is read and scored by Python code of AReaL's"
        missing["task"] = f"{words}; give task={{kind: jsonl, path: ...}}"
        missing["reward"] = f"{words}; give reward={{kind: math_verify}} or another"
    epoch = GSM8K_ROWS // file.number("train_dataset.batch_size", 1) if known else None
    if epoch == 0:
        raise ConfigError(
            f"train_dataset.batch_size: {file.value('train_dataset.batch_size')} is more than the "
            f"{GSM8K_ROWS} rows of {GSM8K}; lower it"
        )
    _steps(file, epoch, config, missing)
    _evaluation(file, epoch, config, missing)


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
    share = file.number("actor.optimizer.warmup_steps_proportion", 0.001)
    config["optimizer"]["warmup_steps"] = int(share * config["steps"])


def _evaluation(file: ArealFile, epoch: int | None, config: Raw, missing: dict[str, str]) -> None:
    epochs, steps = (file.number(f"evaluator.freq_{unit}") for unit in ("epochs", "steps"))
    if steps is not None:
        config["eval"] = {"every": steps}
    elif epochs is None:
        config["eval"] = {"every": 0}
    elif epoch is not None:
        config["eval"] = {"every": epochs * epoch}
    else:
        missing["eval"] = (
            f"evaluator.freq_epochs: {epochs} of data whose size is not known before it is read; "
            "give eval.every=..., or evaluator.freq_steps in the file"
        )
