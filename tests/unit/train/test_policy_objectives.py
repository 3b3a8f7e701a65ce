"""Steps of every policy objective: how the batch is cut, and who trains beside, change nothing.

fp32 sums in another order: 1e-5 of the adapter's update.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.algo.kinds import KINDS
from lorelei.jobs.rl import policy_work
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.run_file import validate
from lorelei.train.archon.engine import archon_engine
from lorelei.train.step import run_works
from lorelei.train.work import Work
from lorelei.types import AdapterSpec, Group, Prompt
from tests.episodes import random_group
from tests.tiny_models import make_tiny

SPEC = AdapterSpec(rank=4, alpha=8, target_modules=("q_proj", "down_proj"))
POLICIES = [kind for kind, made in KINDS.items() if made.job == "rl"]
WHOLE_ANSWERS: dict[str, Any] = {
    "kind": "grpo",
    "rejection_sampling": {"level": "sequence", "agg": "sum", "action": "clamp", "upper": 1.5},
    "kl_ctl": 0.2,
    "kl_estimator": "k2",
}
NEEDED = {"distill": {"teacher": "base", "reward_weight": 1.0}}  # at the start it is the student
CASES: list[dict[str, Any]] = [{"kind": kind, **NEEDED.get(kind, {})} for kind in POLICIES]
CASES.append(WHOLE_ANSWERS)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return load_decoder(make_tiny("llama", tmp_path_factory.mktemp("llama")))


def some_groups(adapter: str) -> list[Group]:
    """Four groups, each with a rollout whose second turn does not continue the first."""
    draw = np.random.default_rng(0)
    prompt = Prompt(id="p", tokens=np.zeros(3, np.int32), messages=(), data={})
    found: list[Group] = []
    for index in range(4):
        rollouts = random_group(draw, 5, [4, 2, 3], adapter)
        (other,) = random_group(draw, 4, [3], adapter)
        talk = replace(rollouts[0], turns=(*rollouts[0].turns, *other.turns))
        rollouts = tuple(replace(one, baseline=0.25) for one in (talk, *rollouts[1:]))
        found.append(Group(adapter=adapter, index=index, prompt=prompt, rollouts=rollouts))
    return found


def work_of(adapter: str, algo: dict[str, Any]) -> Work:
    config = validate(
        {
            "model": "m/m",
            "task": {"kind": "reasoning_gym", "name": "chain_sum"},
            "algo": {"ppo_n_minibatches": 2, **algo},
            "rollout": {"max_new_tokens": 8},
            "adapters": {adapter: {}},
            # adam's sign of a small gradient would hide its size
            "optimizer": {"lr": 1e-2, "eps": 1.0},
            "steps": 9,
        }
    )
    (experiment,) = config.experiments()
    assert isinstance(experiment.algo, PolicyAlgorithm)
    return policy_work(experiment, experiment.algo, some_groups(adapter), version=1)


def moved(decoder: Decoder, works: list[Work], **limits: int) -> torch.Tensor:
    """What the steps change of the first adapter."""
    engine = archon_engine(decoder, **limits)
    for seed, work in enumerate(works):
        engine.add_adapter(work.adapter, SPEC, seed)
    state = engine.adapter_state(works[0].adapter).tensors
    before = {name: tensor.clone() for name, tensor in state.items()}
    run_works(engine, works)
    after = engine.adapter_state(works[0].adapter).tensors
    engine.close()
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


@pytest.mark.parametrize("algo", CASES, ids=lambda algo: "-".join(map(str, algo.values()))[:40])
def test_the_update_of_an_objective_is_the_same_however_its_batch_is_cut(
    decoder: Decoder, algo: dict[str, Any]
) -> None:
    work = work_of("a", algo)
    whole = moved(decoder, [work])
    assert whole.norm() > 0
    for works, limits in (
        ([work], {"max_tokens_per_mb": 12}),
        ([work, work_of("b", WHOLE_ANSWERS)], {}),
        ([work, work_of("b", algo)], {"max_tokens_per_mb": 20}),
    ):
        got = moved(decoder, works, **limits)
        assert (got - whole).norm() <= 1e-5 * whole.norm()
