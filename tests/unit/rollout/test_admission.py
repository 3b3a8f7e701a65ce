"""The capacity rule of asynchronous training."""

from __future__ import annotations

import random

import pytest

from lorelei.rollout.admission import Admission


def admission(**fields: int) -> Admission:
    defaults = {
        "batch_size": 4,
        "max_staleness": 0,
        "max_concurrent": 100,
        "version": 0,
        "accepted": 0,
    }
    return Admission(**{**defaults, **fields})


def areal_capacity(
    max_concurrent: int, batch: int, eta: int, version: int, accepted: int, running: int
) -> int:
    """As AReaL's StalenessManager.get_capacity computes it."""
    concurrency_capacity = max_concurrent - running
    sample_count = accepted + running
    staleness_capacity = (eta + version + 1) * batch - sample_count
    return min(concurrency_capacity, staleness_capacity)


@pytest.mark.parametrize("seed", range(50))
def test_capacity_is_that_of_areal(seed: int) -> None:
    rng = random.Random(seed)
    concurrent, batch, eta = rng.randint(1, 20), rng.randint(1, 8), rng.randint(0, 4)
    version, accepted, running = rng.randint(0, 9), rng.randint(0, 80), rng.randint(0, 20)
    ours = admission(
        batch_size=batch,
        max_staleness=eta,
        max_concurrent=concurrent,
        version=version,
        accepted=accepted,
        running=running,
    )
    theirs = areal_capacity(concurrent, batch, eta, version, accepted, running)
    assert ours.capacity() == theirs


def test_synchronous_training_admits_one_batch_a_version() -> None:
    one = admission()
    for _ in range(4):
        one.start()
    assert one.capacity() == 0
    for _ in range(4):
        one.accept()
    assert one.capacity() == 0, "the next batch waits for the next version"
    one.version = 1
    assert one.capacity() == 4


def test_a_group_that_fails_or_grows_stale_gives_its_room_back() -> None:
    one = admission()
    for _ in range(4):
        one.start()
    one.give_back()
    assert one.capacity() == 1
    one.start()
    for _ in range(4):
        one.accept()
    one.forget()
    assert one.capacity() == 1


def test_concurrency_limits_what_staleness_would_allow() -> None:
    one = admission(max_staleness=3, max_concurrent=5)
    for _ in range(5):
        one.start()
    assert one.capacity() == 0
    one.accept()
    assert one.capacity() == 1
