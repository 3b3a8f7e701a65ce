"""Every field of every algorithm changes what a job asks of the train engine, or of sampling."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.kinds import KINDS, class_of
from lorelei.algo.loss import load_loss
from lorelei.algo.preference import PreferenceAlgorithm
from lorelei.algo.sft import Sft
from lorelei.config.experiment import Experiment
from lorelei.config.section import Section
from lorelei.data.examples import ExampleRenderer, ExampleSource
from lorelei.data.pairs import ComparisonSource
from lorelei.data.renderer import Renderer
from lorelei.jobs.preference import PreferenceJob
from lorelei.jobs.rl import RlJob
from lorelei.jobs.sft import SftJob
from lorelei.rollout.collector import unfit
from lorelei.run_file import validate
from lorelei.train.items import loss_items
from lorelei.train.work import Round, Work
from lorelei.types import Batch, Comparison, Example, Floats, Group, ItemOutputs, Items, Prompt
from tests.episodes import random_group
from tests.tiny_models import make_tokenizer

EXAMPLE = f"{Path(__file__).parents[3] / 'docs' / 'extend' / 'example_algorithm.py'}:Awr"

Fields = dict[str, Any]

LEVELS = {"mean_level": "none", "std_level": "none"}
RAW: Fields = {"adv_norm": None}  # what is normalised forgets its scale and its mean
BY_GROUP: Fields = {"mean_level": "group", "std_level": "batch"}
BY_BATCH: Fields = {"mean_level": "batch", "std_level": "batch"}
KL: Fields = {"kl_ctl": 0.5, "use_kl_in_reward": True}
TWO: Fields = {"ppo_n_minibatches": 2}  # then the policy moves within a step
BOUNDED: Fields = {**TWO, "use_decoupled_loss": True, "rejection_sampling": {"upper": 1.2}}
# {field: (another value, the fields beside it with which it has an effect)}
OTHER: dict[str, tuple[Any, Fields]] = {
    "batch_size": (2, {}),
    "ppo_n_minibatches": (2, {}),
    "kl_ctl": (0.5, {}),
    "use_kl_in_reward": (True, {"kl_ctl": 0.5}),
    "kl_estimator": ("k1", KL),
    "loss_aggregation": ("sequence", {}),
    "reward_scaling": (2.0, RAW),
    "reward_bias": (2.0, RAW),
    "reward_clip": (1e-3, RAW),
    "reward_norm": ({"std_level": "batch"}, RAW),
    "reward_norm.mean_level": ("batch", {**RAW, "reward_norm": LEVELS}),
    "reward_norm.std_level": ("group", {**RAW, "reward_norm": LEVELS}),
    "reward_norm.weigh_by": ("token", {**RAW, "reward_norm": BY_BATCH}),
    "reward_norm.mean_leave1out": (True, {**RAW, "reward_norm": BY_GROUP}),
    "reward_norm.std_unbiased": (True, {**RAW, "reward_norm": BY_GROUP}),
    "reward_norm.std_around": ("subtracted_mean", {**RAW, "reward_norm": BY_GROUP}),
    "reward_norm.eps": (0.5, {**RAW, "reward_norm": BY_GROUP}),
    "adv_norm": ({"std_level": "batch"}, {}),
    "adv_norm.mean_level": ("batch", {"adv_norm": LEVELS}),
    "adv_norm.std_level": ("group", {"adv_norm": LEVELS}),
    "adv_norm.weigh_by": ("token", {"adv_norm": BY_BATCH}),
    "adv_norm.mean_leave1out": (True, {"adv_norm": BY_GROUP}),
    "adv_norm.std_unbiased": (True, {"adv_norm": BY_GROUP}),
    "adv_norm.std_around": ("subtracted_mean", {"adv_norm": BY_GROUP}),
    "adv_norm.eps": (0.5, {"adv_norm": BY_GROUP}),
    "drop_zero_variance_groups": (True, {}),
    "max_dropped_groups": (1, {"drop_zero_variance_groups": True}),
    "loss_length": (7, {"loss_aggregation": "constant"}),
    "overlong_penalty": ({"buffer": 5}, {**RAW, "overlong_penalty": None}),
    "overlong_penalty.buffer": (6, {**RAW, "overlong_penalty": {"buffer": 5}}),
    "overlong_penalty.factor": (0.5, {**RAW, "overlong_penalty": {"buffer": 5}}),
    "turn_discount": (0.5, RAW),
    "eps_clip": (0.05, TWO),
    "eps_clip_higher": (0.6, TWO),
    "use_decoupled_loss": (False, {}),
    "recompute_logprob": (True, {**TWO, "use_decoupled_loss": False}),
    "rejection_sampling": ({"upper": 1.05}, TWO),
    "rejection_sampling.upper": (1.2, {**TWO, "rejection_sampling": {"upper": 1.05}}),
    "rejection_sampling.lower": (0.9, {**TWO, "rejection_sampling": {"upper": 1.05}}),
    "rejection_sampling.level": ("sequence", BOUNDED),
    "rejection_sampling.action": ("clamp", BOUNDED),
    "rejection_sampling.metric": ("kl_k2", BOUNDED),
    "rejection_sampling.agg": (
        "sum",
        {**BOUNDED, "rejection_sampling": {"upper": 1.2, "level": "sequence"}},
    ),
    "c_clip": (1.25, TWO),
    "baseline_of": ("group", {}),
    "tau_pos": (3.0, {}),
    "tau_neg": (3.0, {}),
    "m2_threshold": (0.001, {}),
    "beta": (0.5, {}),
    "gamma": (0.2, {}),
    "loss_type": ("hinge", {}),
    "label_smoothing": (0.2, {}),
    "desirable_weight": (2.0, {}),
    "undesirable_weight": (2.0, {}),
    "loss_on": ("assistant_turns", {}),
    "weight_field": ("worth", {}),
    "max_weight": (1.1, {}),
    "discount": (0.5, {}),
    "reference": ("folder", {"kl_ctl": 0.5}),
    "teacher": ("folder", {}),
    "reward_weight": (0.5, {}),
}
# where a kind's own default is another
OTHER_OF: dict[tuple[str, str], tuple[Any, Fields]] = {
    ("dr_grpo", "loss_aggregation"): ("token", {}),
    **{(kind, "loss_aggregation"): ("token", {}) for kind in ("gspo", "gspo_token", "sapo")},
    **{(kind, "use_decoupled_loss"): (True, TWO) for kind in ("cispo", "sapo")},
    # of an unclipped ratio only another weight than the token's own shows
    ("m2po", "use_decoupled_loss"): (
        True,
        {**TWO, "rejection_sampling": {"upper": 9.0, "level": "sequence"}},
    ),
    ("dapo", "c_clip"): (1.3, TWO),
    ("dapo", "drop_zero_variance_groups"): (False, {}),
    **{(kind, "c_clip"): (1.05, TWO) for kind in ("gspo", "gspo_token")},
    ("cispo", "eps_clip_higher"): (0.1, {}),
}
BASELINE = "leave-one-out advantages of a group have mean zero, whatever mean was subtracted before"
# what a kind needs, or what gives the fields of rewards an effect
BESIDE: dict[str, Fields] = {"distill": {"teacher": "base", "reward_weight": 1.0}}
WITHOUT = {  # {(kind, field): why it needs no effect}
    ("rloo", "reward_norm.mean_level"): BASELINE,
    ("rloo", "adv_norm.mean_level"): BASELINE,
    ("rloo", "adv_norm.std_around"): BASELINE,
}
ALGORITHMS = {**{kind: kind for kind in KINDS}, "example": EXAMPLE}


def paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted fields of a section and of those in it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for below in (field.annotation, *get_args(field.annotation)):
            if inspect.isclass(below) and issubclass(below, Section):
                yield from paths(below, f"{prefix}{name}.")


FIELDS = [
    (kind, path)
    for kind, name in ALGORITHMS.items()
    for path in paths(class_of(name))
    if path != "kind"  # which algorithm it is
]


class Collected:
    """Groups that are there, for a job that asks its collector for a batch."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)

    async def batch(self) -> list[Group]:
        return self.groups


def groups_of(count: int) -> list[Group]:
    """Groups of three rollouts, the first of two turns."""
    draw = np.random.default_rng(0)
    prompt = Prompt(id="p", tokens=np.zeros(3, np.int32), messages=(), data={})
    found: list[Group] = []
    for index in range(count):
        rollouts = random_group(draw, 3, [4, 2, 3])
        talk = replace(rollouts[0], turns=(*rollouts[0].turns, *rollouts[1].turns))
        rollouts = tuple(replace(one, baseline=0.25) for one in (talk, *rollouts[1:]))
        found.append(Group(adapter="a", index=index, prompt=prompt, rollouts=rollouts))
    return found


def examples_of(count: int, algo: Sft) -> list[tuple[str, Example]]:
    """Chats of two turns, each row with what it is worth."""
    renderer = ExampleRenderer(
        prompts=Renderer(tokenizer=make_tokenizer()),
        stop_token_ids=(2,),
        max_tokens=400,
        all_turns=algo.loss_on == "assistant_turns",
        weight_field=algo.weight_field,
    )
    words = [("user", "Hi"), ("assistant", "ab"), ("user", "Yes"), ("assistant", "c")]
    chat = [{"role": role, "content": text} for role, text in words]
    rows = [{"messages": chat, "worth": 1 + number} for number in range(count)]
    return [renderer.example(str(number), row) for number, row in enumerate(rows)]


def comparisons_of(count: int, paired: bool) -> list[tuple[str, Comparison]]:
    """Two answers to each prompt, or one of either sign."""
    draw = np.random.default_rng(0)
    prompts, answers = (draw.integers(0, 300, (count, n)).astype(np.int32) for n in (3, 5))
    return [
        (
            str(i),
            Comparison(
                id=str(i),
                prompt=prompt,
                answers=(own[:2], own[2:]) if paired else (own,),
                signs=(1, -1) if paired else (1 if i % 2 else -1,),
            ),
        )
        for i, (prompt, own) in enumerate(zip(prompts, answers, strict=True))
    ]


class Still:
    """An engine, in a thread of its own, in which every policy says something else."""

    @property
    def engine(self) -> Still:
        return self

    async def call(self, function: Any, *args: Any) -> Any:
        return function(*args)

    def logprobs(self, batch: Batch, policy: str) -> ItemOutputs:
        values = np.full(len(batch.items), -1.0 if policy == "current" else -1.1, np.float32)
        return ItemOutputs(logprobs=values, entropy=values)


def work_of(e: Experiment) -> Work:
    """What the job of an adapter would have done next."""
    # of a job only what `work` asks is there
    common: Fields = {"experiment": e, "algo": e.algo, "evaluations": None, "watched": None}
    if isinstance(e.algo, PolicyAlgorithm):
        collected: Any = Collected(groups_of(e.algo.batch_size))
        return asyncio.run(RlJob(collector=collected, evaluator=None, store=None, **common).work())
    rows: Fields = {"name": "rows", "eval_size": 0, "seed": 0}
    if isinstance(e.algo, PreferenceAlgorithm):
        compared = comparisons_of(16, e.algo.paired)
        pairs, thread = ComparisonSource(compared, max_tokens=20, **rows), cast(Any, Still())
        job = PreferenceJob(source=pairs, max_tokens=20, thread=thread, **common)
        return asyncio.run(job.work())
    assert isinstance(e.algo, Sft)
    source = ExampleSource(examples_of(16, e.algo), **rows)
    return asyncio.run(SftJob(source=source, thread=cast(Any, None), **common).work())


def totals(work: Work) -> list[float]:
    """The losses of the rounds, of log-probabilities that are near those of the rollouts."""
    read, currents = zip(*(near(one, work.policies) for one in work.rounds), strict=True)
    if work.advantages is not None:
        found = work.advantages(read)
        read = [
            replace(items, streams={**items.streams, "advantage": own})
            for items, own in zip(read, found, strict=True)
        ]
    losses: list[float] = []
    for one, items, current in zip(work.rounds, read, currents, strict=True):
        tensors = loss_items(items, slice(0, len(items)), current)
        result = load_loss(one.loss)(current, tensors, **one.loss.params)
        losses.append(round(result.total.item(), 4))
    return losses


def near(one: Round, policies: Collection[str]) -> tuple[Items, torch.Tensor]:
    """The items with the streams of policies, and the current log-probabilities."""
    items, draw = one.batch.items, np.random.default_rng(1)
    sampled = items.streams.get("behaviour", np.full(len(items), -3.0))

    def moved() -> Floats:
        return (sampled + draw.normal(size=len(items)) * 0.3).astype(np.float32)

    current, others = torch.from_numpy(moved()).double(), {"proximal": moved()}
    others["reference"], others["teacher"] = moved(), moved()
    filled = {name: others[name] for name in policies}
    return replace(items, streams={**items.streams, **filled}), current


def effects(kind: str, fields: Fields) -> list[Any]:
    """What follows from the settings of an algorithm."""
    sampled = class_of(kind).job == "rl"
    config = validate(
        {
            "model": "m/m",
            "task": {"kind": "jsonl", "path": "rows.jsonl"},
            "algo": {"kind": kind, **fields},
            **({"env": {"kind": "multi_turn", "max_turns": 2}} if sampled else {}),
            **({"rollout": {"max_new_tokens": 8}} if sampled else {}),
            **({"reward": {"kind": "math_verify"}} if sampled else {}),
        }
    )
    (experiment,) = config.experiments()
    work = work_of(experiment)
    group = groups_of(1)[0]
    equal = replace(group, rollouts=tuple(replace(r, reward=1.0) for r in group.rollouts))
    return [
        experiment.max_concurrent,
        unfit(equal, experiment.algo) if sampled else None,  # type: ignore[arg-type]
        getattr(experiment.algo, "max_dropped_groups", None),  # see test_collector
        work.policies,
        [len(one.batch.items) for one in work.rounds],
        totals(work),
    ]


def with_field(fields: Fields, path: str, value: Any) -> Fields:
    name, _, below = path.partition(".")
    if not below:
        return {**fields, name: value}
    return {**fields, name: with_field(fields[name], below, value)}


@pytest.mark.parametrize(("kind", "path"), FIELDS)
def test_every_field_has_an_effect(kind: str, path: str) -> None:
    name, excused = ALGORITHMS[kind], (kind, path) in WITHOUT
    if excused and path not in OTHER:
        return
    value, beside = OTHER_OF.get((kind, path)) or OTHER[path]
    beside = {**BESIDE.get(kind, {}), **beside}
    known = class_of(name).model_fields
    beside = {key: held for key, held in beside.items() if key in known}
    usual, changed = (effects(name, f) for f in (beside, with_field(beside, path, value)))
    assert (usual == changed) == excused


def test_only_fields_that_are_there_are_excused() -> None:
    assert set(WITHOUT) | set(OTHER_OF) <= set(FIELDS)
    assert set(OTHER) <= {path for _, path in FIELDS}
