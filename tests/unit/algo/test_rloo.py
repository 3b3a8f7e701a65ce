"""RLOO's baseline and loss against formulas written by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorelei.algo.rloo import leave_one_out, loss
from tests.loss_items import some_items, with_streams, without


def test_leave_one_out_is_the_reward_less_the_mean_of_the_others() -> None:
    got = leave_one_out(np.array([1.0, 0.0, 0.5], dtype=np.float32))
    np.testing.assert_allclose(got, [1 - 0.25, 0 - 0.75, 0.5 - 0.5], rtol=1e-6)
    assert got.sum() == pytest.approx(0, abs=1e-6)
    # closed form: G / (G - 1) times the distance from the mean
    rewards = np.random.default_rng(0).normal(size=9).astype(np.float32)
    closed = 9 / 8 * (rewards - rewards.mean())
    np.testing.assert_allclose(leave_one_out(rewards), closed, atol=1e-6)


def test_leave_one_out_of_a_single_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 rewards, got 1"):
        leave_one_out(np.ones(1, dtype=np.float32))


def test_on_policy_it_is_reinforce() -> None:
    current, items = some_items()
    items = with_streams(without(items, "reference"), behaviour=current.clone())
    current.requires_grad_()
    loss(current, items).total.backward()
    torch.testing.assert_close(current.grad, -items.streams["advantage"] * items.weight)
