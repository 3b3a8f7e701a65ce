"""Policy losses and their gradients against those of TRL's own trainer on the same tensors.

Shapes: I items.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorelei.algo.kinds import algorithm
from lorelei.algo.loss import LossItems, item_weights, load_loss

FOUND = json.loads((Path(__file__).parents[2] / "fixtures" / "trl" / "policy.json").read_text())
AGGREGATION = {"grpo": "sequence", "sapo": "sequence", "dr_grpo": "constant"}  # else: token
RECOMPUTED = {"ppo_n_minibatches": 2, "use_decoupled_loss": False, "recompute_logprob": True}


def ours(case: dict[str, Any]) -> dict[str, Any]:
    """Our settings for those of a GRPOConfig."""
    loss_type, fields = case["loss_type"], {**RECOMPUTED}
    aggregation = AGGREGATION.get(loss_type, "token")
    fields["loss_aggregation"] = aggregation
    if case["beta"]:
        fields["kl_ctl"] = case["beta"]
    if case["mode"] is not None:
        level, _, what = case["mode"].partition("_")
        bounds = {"upper": case["clip_max"], "lower": case["clip_min"], "level": level}
        bounds["action"] = {"truncate": "clamp", "mask": "mask"}[what]
        if level == "sequence":
            bounds["agg"] = "sum"
        fields |= {
            "ppo_n_minibatches": 2,
            "use_decoupled_loss": True,
            "recompute_logprob": None,
            "rejection_sampling": bounds,
        }
    if loss_type == "sapo":
        return {"kind": "sapo", **fields}
    if loss_type == "cispo":  # there the bound is the weight's own
        return {"kind": "cispo", "eps_clip_higher": case["epsilon_high"] - 1, **fields}
    fields |= {"eps_clip": case["epsilon_low"], "eps_clip_higher": case["epsilon_high"]}
    if case["delta"] is not None:
        fields["c_clip"] = case["delta"]
    if case["importance_sampling_level"] == "sequence":
        return {"kind": "gspo", **fields}
    kinds = {"dr_grpo": "dr_grpo", "dapo": "dapo"}
    return {"kind": kinds.get(loss_type, "grpo"), **fields}


def differences(case: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in case.items() if v not in (None, 0.0, 0.2))


@pytest.mark.parametrize("found", FOUND["results"], ids=lambda found: differences(found["case"]))
def test_the_loss_and_its_gradient_are_trls(found: dict[str, Any]) -> None:
    algo = algorithm(ours(found["case"]))
    spec = algo.loss()
    columns = {
        name: torch.tensor(values, dtype=torch.float64) for name, values in FOUND["streams"].items()
    }
    current = columns.pop("current").requires_grad_()
    sequence = np.repeat(np.arange(len(FOUND["lengths"])), FOUND["lengths"])
    weight = item_weights(sequence, algo.loss_aggregation, FOUND["longest"])
    items = LossItems(
        weight=torch.from_numpy(weight).double(),
        sequence=torch.from_numpy(sequence),
        streams={name: columns[name] for name in {*spec.streams, *algo.policies}},
    )
    total = load_loss(spec)(current, items, **spec.params).total
    total.backward()
    assert total.item() == pytest.approx(found["loss"], rel=1e-5)
    assert current.grad is not None
    expected = torch.tensor(found["gradient"], dtype=torch.float64)
    torch.testing.assert_close(current.grad, expected, rtol=1e-5, atol=1e-9)
    assert (expected == 0).sum() < len(expected)
