"""What a run may be given anew when it goes on: fields that do not change what was trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorelei.config.errors import ConfigError, shown
from lorelei.config.experiment import ExperimentDefaults
from lorelei.config.run import DEFAULT_ADAPTER, RunConfig
from lorelei.config.section import is_mapping
from lorelei.run_file import absolute_here, moved, set_key, split_override, to_plain, validate
from lorelei.store.change import Change, change
from lorelei.store.manifest import Manifest, steps_done

Raw = dict[str, Any]

# sections and fields: how long, where, how fast and how it is watched; docs/resume.md has them
CHANGEABLE = frozenset(
    {
        "steps",
        *("threads", "checkpoint", "cluster", "machine", "publish", "train"),
        *("eval", "task.eval_size"),  # as long as the same rows are held out
        *("reward.timeout", "reward.workers", "reward.start_timeout", "reward.memory_gib"),
        *("reward.output_kib", "reward.trial", "reward.env", "env.timeout"),
        *("rollout.max_concurrent", "rollout.max_running", "rollout.replicas", "rollout.urls"),
        *("rollout.threads", "rollout.tensor_parallel_size", "rollout.cpu_cache_gib"),
        *("rollout.reserve_rank", "rollout.extra_args"),
        # where the inputs lie: what they are is compared
        *("model", "task.path", "reward.path", "env.path", "env.tools"),
    }
)
_KINDS = frozenset({"cluster.kind", "publish.kind", "train.kind"})
_REASONS = {
    "name": "the run is where its folder is, which can be moved",
    "runs_dir": "the run is where its folder is, which can be moved",
    "seed": "the order of the data and the samples follow from it",
    "dtype": "the base model would be another one",
    "lora": "the adapter that was trained has it",
    "task": "what it is trained on would be something else",
    "env": "what it is trained on would be something else",
    "reward": "what it is trained for would be something else",
    "algo": "how it learns would be something else",
    "optimizer": "how it learns would be something else",
    "rollout": "what it is trained on would be something else",
}
_ENGINES = "the settings beside it are of the kind that the run has"


@dataclass(frozen=True, slots=True, kw_only=True)
class Amended:
    """A run's configuration as it goes on, and what is new in it."""

    before: RunConfig
    config: RunConfig
    changes: Sequence[Change]

    @property
    def notes(self) -> list[str]:
        """A line for each change."""
        return [f"{c.field}: {shown(c.before)} -> {shown(c.after)}" for c in self.changes]


def amend(recorded: Mapping[str, Any], overrides: Sequence[str]) -> Amended:
    """The configuration in a run's folder with overrides such as 'steps=60'.

    Raises ConfigError for a field that a resume cannot change, naming it and the reason.
    """
    before = validate(absolute_here(dict(recorded)))
    plain = to_plain(before)
    for override in overrides:
        _apply(plain, override)
        plain = moved(plain, replace=True)
    config = validate(absolute_here(plain))
    changes = [
        change(field, old, new, "resume")
        for field, old, new in _differences(to_plain(before), to_plain(config))
    ]
    for one in changes:
        _check(one.field, one.before, one.after)
    for old, new in zip(before.experiments(), config.experiments(), strict=True):
        if old.eval_size != new.eval_size:
            fix = f"keep them with task.eval_size={old.eval_size}, and eval.n_prompts at most that"
            raise ConfigError(
                f"eval: {new.eval_size} problems would be held out of adapter {new.name}'s data, "
                f"not {old.eval_size}, and the order of the others would change; "
                + (fix if old.eval_size else "a run that was begun without any goes on without")
            )
    return Amended(before=before, config=config, changes=changes)


def check_steps(amended: Amended, latest: Manifest | None) -> list[str]:
    """Lines about rates that follow from the number of steps.

    Raises ConfigError for an adapter that would have to end before it stands.
    """
    lines: list[str] = []
    for old, new in zip(amended.before.experiments(), amended.config.experiments(), strict=True):
        if old.steps == new.steps or latest is None or new.name not in latest.adapters:
            continue
        done = steps_done(latest.adapters[new.name].record)
        where = f"adapters.{new.name}.steps" if amended.config.adapters else "steps"
        if new.steps <= done:
            raise ConfigError(
                f"{where}: {new.steps} is not above the {done} steps that are done; give the number"
                " of all steps, those included"
            )
        if new.optimizer.lr_schedule != "constant":
            rates = [e.optimizer.at(min(done, e.steps), e.steps).lr for e in (old, new)]
            lines.append(
                f"{new.name}: the {new.optimizer.lr_schedule} schedule now spans {new.steps} steps:"
                f" the rate of step {done + 1} is {rates[1]:.3g}, not {rates[0]:.3g}"
            )
    return lines


def _apply(plain: Raw, override: str) -> None:
    """Set a field of a resolved configuration, in place, and of the adapters that follow it."""
    key, value = split_override(override)
    adapters: Raw = plain["adapters"]
    if key.startswith(f"adapters.{DEFAULT_ADAPTER}.") and not adapters:
        key = key.removeprefix(f"adapters.{DEFAULT_ADAPTER}.")
    first, _, rest = key.partition(".")
    if first == "adapters":
        name = rest.partition(".")[0]
        if name not in adapters or "." not in rest:
            there = ", ".join(adapters) or DEFAULT_ADAPTER
            raise ConfigError(
                f"{key}: a resume adds and removes no adapter; write adapters.NAME.FIELD=..., with "
                f"NAME one of: {there}"
            )
    if (old := _value(plain, key)) not in (None, value):
        _check(key, old, value)  # before another kind's settings are said to be unknown
    if first in ExperimentDefaults.model_fields and adapters:
        _apply_to_all(plain, key, value)
    set_key(plain, key, value)


def _apply_to_all(plain: Raw, key: str, value: object) -> None:
    """In the adapters that have the run's value: a resolved configuration repeats it in each."""
    default = _value(plain, key)
    entries = [e for e in plain["adapters"].values() if _value(e, key) == default]
    first = key.partition(".")[0]
    if not entries and first in next(iter(plain["adapters"].values())):
        raise ConfigError(
            f"{key}: every adapter has its own; write adapters.NAME.{key}=..., with NAME one of: "
            f"{', '.join(plain['adapters'])}"
        )
    for entry in entries:
        if first in entry:
            set_key(entry, key, value)


def _value(section: Raw, key: str) -> object:
    found: object = section
    for name in key.split("."):
        found = found.get(name) if is_mapping(found) else None
    return found


def _differences(
    before: object, after: object, where: str = ""
) -> Iterator[tuple[str, object, object]]:
    """(dotted key, before, after) of what differs."""
    if is_mapping(before) and is_mapping(after):
        for key in {**before, **after}:
            at = f"{where}.{key}" if where else str(key)
            yield from _differences(before.get(key), after.get(key), at)
    elif before != after:
        yield where, before, after


def _check(field: str, before: object, after: object) -> None:
    """Raises ConfigError when the field is none of CHANGEABLE."""
    parts = field.split(".")
    own = parts[2:] if parts[0] == "adapters" else parts
    dotted = ".".join(own)
    allowed = own[0] in CHANGEABLE or ".".join(own[:2]) in CHANGEABLE
    if allowed and dotted not in _KINDS:
        return
    reason = _ENGINES if dotted in _KINDS else _REASONS.get(own[0], "it is part of the run")
    raise ConfigError(
        f"{field}: a resume cannot change {shown(before)} to {shown(after)}: {reason}; start "
        "another run, from an export of this one with lora.init_from"
    )
