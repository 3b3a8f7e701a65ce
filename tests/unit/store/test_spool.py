"""The spool keeps finished groups exactly, or says which one it lost."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from lorelei.store.durable import StoreError
from lorelei.store.spool import Spool
from lorelei.types import Completion, Group, Prompt, Rollout, Turn


def group(index: int, adapter: str = "a", seed: int = 0) -> Group:
    rng = np.random.default_rng([seed, index])
    prompt = Prompt(
        id=f"sums/{index}",
        tokens=rng.integers(0, 300, 5).astype(np.int32),
        messages=({"role": "system", "content": "Count."}, {"role": "user", "content": "½ + ½?"}),
        data={"answer": "1", "metadata": {"terms": [0.5, 0.5], "none": None}},
    )
    completion = Completion(
        tokens=rng.integers(0, 300, 6).astype(np.int32),
        # the widest range of exponents: every bit must come back
        logprobs=-np.exp(rng.uniform(-80, 4, 6)).astype(np.float32),
        versions=((3, 4), (4, 2)),
        finish_reason="stop",
    )
    turn = Turn(prompt=prompt.tokens, completion=completion, text="1 \x1b[2J\ud7ff")
    good = Rollout(
        adapter=adapter,
        sample=0,
        turns=(turn, turn),
        reward=0.1,
        metrics={"strict": 1.0},
        seconds=2,
    )
    failed = Rollout(adapter=adapter, sample=1, turns=(), reward=None, error="timeout")
    return Group(adapter=adapter, index=index, prompt=prompt, rollouts=(good, failed))


def same(one: Group, other: Group) -> bool:
    """Whether two groups have equal values of equal types, arrays bit by bit."""

    def plain(value: object) -> object:
        if isinstance(value, np.ndarray):
            return (value.dtype, value.shape, value.tobytes())
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return (type(value), [plain(item) for item in value])
        return (type(value), value) if isinstance(value, bool) else value

    return plain(asdict(one)) == plain(asdict(other))


def test_groups_come_back_bit_by_bit(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    groups = {index: group(index) for index in (12, 3, 100_000_000)}
    for one in groups.values():
        spool.put(one)
    found = Spool(tmp_path).read("a")
    assert list(found) == [3, 12, 100_000_000]
    assert all(same(found[index], groups[index]) for index in groups)


def test_adapters_have_groups_of_their_own(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(group(1, "a", seed=1))
    spool.put(group(1, "b", seed=2))
    spool.remove("a", [1, 7])
    assert spool.read("a") == {} and list(spool.read("b")) == [1]


def test_an_adapter_without_groups_has_none(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    assert spool.read("a") == {}
    spool.remove("a", [1])


def test_a_group_put_again_replaces_the_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(group(1, seed=1))
    spool.put(group(1, seed=2))
    assert same(spool.read("a")[1], group(1, seed=2))


@pytest.mark.parametrize("place", [0, 0.3, 0.6, -1])
def test_a_damaged_group_is_named_and_forgotten_and_the_others_stay(
    tmp_path: Path, place: float
) -> None:
    spool = Spool(tmp_path)
    spool.put(group(1))
    spool.put(group(2))
    path = next(tmp_path.rglob("*1.json"))
    data = bytearray(path.read_bytes())
    data[int(place * len(data)) if place >= 0 else -3] ^= 1
    path.write_bytes(data)
    assert list(spool.read("a")) == [2]
    assert len(spool.warnings) == 1 and str(path) in spool.warnings[0]
    assert not path.exists()


def test_a_group_that_is_not_plain_is_refused(tmp_path: Path) -> None:
    odd = replace(group(1), prompt=replace(group(1).prompt, data={"answer": object()}))
    with pytest.raises(ValueError, match="not JSON serializable"):
        Spool(tmp_path).put(odd)
    assert list(tmp_path.rglob("*.json")) == []


def test_a_group_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        Spool(tmp_path).put(group(1))
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]
