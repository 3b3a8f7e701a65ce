"""Every policy objective, each an adapter of one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.algo.kinds import KINDS
from lorelei.launch import local
from lorelei.run_file import load_config
from tests.tiny_runs import lorelei, make_workplace, records, write_run

POLICIES = [kind for kind, made in KINDS.items() if made.job == "rl"]
MORE: dict[str, dict[str, Any]] = {
    "dapo": {"max_dropped_groups": 1},
    "distill": {"teacher": "base", "reward_weight": 1.0},
    "m2po": {"kl_ctl": 0.1, "use_kl_in_reward": True},
    "reinforce_pp": {"baseline_of": "group"},
}


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    return make_workplace(tmp_path_factory.mktemp("objectives"), tiny_tokenizer)


def test_all_policy_objectives_train_beside_one_another_and_go_on_after_a_resume(
    place: Path,
) -> None:
    entries = {
        kind.replace("_", "-"): {"algo": {"kind": kind, **MORE.get(kind, {})}} for kind in POLICIES
    }
    algo = {"ppo_n_minibatches": 2}
    path = write_run(place, "all", steps=2, adapters=entries, algo=algo, eval={"every": 0})
    planned = lorelei(place, "plan", path.name)
    assert "dapo: dapo is grpo with ppo_n_minibatches: 2, overlong_penalty" in " ".join(
        planned.split()
    )
    local.train(load_config(path, [f"runs_dir={place / 'runs'}"]))
    local.resume(place / "runs" / "all", ["steps=3"])
    found = records(place / "runs" / "all", "step")
    for name in entries:
        own = [record for record in found if record["adapter"] == name]
        assert [record["step"] for record in own] == [1, 2, 3]
        assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in own)
    remax = [record for record in found if record["adapter"] == "remax"]
    assert all(0 <= record["reward_baseline"] <= 1 for record in remax)
