"""A run folder that earlier code wrote is checked and resumed by this code.

tests/fixtures/run_before_jobs/README.md says how the folder came to be.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import make_tiny
from tests.tiny_runs import lorelei, records

pytestmark = pytest.mark.slow
FIXTURE = Path(__file__).parents[1] / "fixtures/run_before_jobs"
MADE_IN = "/workplace"  # where the run was trained
NAME = "before_jobs"
SPOOLED = "spool/default/00000004.json"


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The old run's workplace, moved here, and the run resumed to its end."""
    folder = tmp_path_factory.mktemp("place")
    tiny_tokenizer.save_pretrained(make_tiny("llama", folder / "model"))
    for name in ("rows.jsonl", "rewards.py"):
        shutil.copy(FIXTURE / name, folder)
    shutil.copytree(FIXTURE / NAME, folder / "runs" / NAME)
    moved(folder / "runs" / NAME / "run.json", folder)
    assert lorelei(folder, "check", NAME) == "no problems\n"
    said = lorelei(folder, "resume", NAME)
    assert "resuming after step 2" in said
    assert "recorded what this run is made of" in said and ": model, task.path, rew" in said
    return folder


def moved(path: Path, to: Path) -> None:
    """Change where a run.json says that its files are, and its checksum."""
    body = json.loads(path.read_text().replace(MADE_IN, str(to)))
    del body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()}))


def newest(folder: Path) -> dict[str, Any]:
    """The last manifest."""
    return json.loads(max((folder / "manifests").glob("*.json")).read_text())


def snapshot(folder: Path) -> dict[str, Tensor]:
    """The adapter and its moments in the last manifest."""
    return load_file(folder / newest(folder)["adapters"]["default"]["snapshot"])


def test_an_old_run_goes_on_to_its_end(place: Path) -> None:
    folder = place / "runs" / NAME
    assert lorelei(place, "check", NAME) == "no problems\n"
    before, after = newest(FIXTURE / NAME), newest(folder)
    assert (before["step"], after["step"]) == (2, 4)
    assert (after["run"], after["incarnation"]) == (before["run"], before["incarnation"] + 1)
    assert (before["format"], after["format"]) == (1, 2)
    record = after["adapters"]["default"]["record"]
    assert (record["version"], record["optimizer_step"]) == (4, 4)
    assert (record["state"]["next_index"], record["state"]["pending"]) == (8, [])
    assert after["state"]["finished"] is True
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (folder / name).read_bytes().startswith((FIXTURE / NAME / name).read_bytes()), name
    steps = records(folder, "step")
    assert [(r["step"], r["version"], r["optimizer_step"]) for r in steps] == [
        (n, n, n) for n in (1, 2, 3, 4)
    ]
    assert max(r["staleness_max"] for r in steps) == 1
    assert [r["step"] for r in records(folder, "eval")] == [0, 3, 4]


def test_a_group_that_was_spooled_is_trained_on_and_none_twice(place: Path) -> None:
    folder = place / "runs" / NAME
    spooled = json.loads((FIXTURE / NAME / SPOOLED).read_text())
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    trained = {r["prompt_id"]: r["step"] for r in rollouts}
    assert sorted(trained.values()) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(rollouts) == 4 * len(trained)
    kept = [r["completion"] for r in rollouts if r["prompt_id"] == spooled["prompt"]["id"]]
    assert kept == [rollout["turns"][0]["text"] for rollout in spooled["rollouts"]]
    assert not list((folder / "spool").rglob("*.json"))


def test_what_an_old_run_ends_with_can_be_used(place: Path) -> None:
    start, end = (snapshot(folder) for folder in (FIXTURE / NAME, place / "runs" / NAME))
    assert start.keys() == end.keys()
    assert not any(start[name].equal(end[name]) for name in start)
    scores = json.loads(lorelei(place, "eval", NAME, "--json"))["default"]
    assert scores["v4"] == records(place / "runs" / NAME, "eval")[-1]["scores"]
