"""Megatron's layouts against transformers: log-probabilities, gradients, steps, the base model.

usage: python -m acceptance megatron [CASE ...]
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acceptance.record import Line
from acceptance.table import table
from lorelei.lora.targets import FUSED
from lorelei.train.contract import TrainEngine
from lorelei.types import BASE, AdamHyper, AdapterSpec, Batch, Rollout
from tests.contract.oracle import Oracle, grpo_loss, make_oracle, turn_logprobs
from tests.contract.train_engines import GRPO, MEGATRON, adapters, look, make_engine
from tests.episodes import random_group, weighted_batch
from tests.tiny_models import make_tiny

LIMIT = 1e-5  # two orders of summation in fp32 differ by about 1e-6
DENSE = (
    *("megatron", "megatron-tp2", "megatron-tp2-sp", "megatron-pp2", "megatron-dp2"),
    *("megatron-dp2-sharded", "megatron-tp2-pp2", "megatron-cp2"),
)
SPARSE = (
    *("megatron", "megatron-ep2", "megatron-tp2-sp-ep2", "megatron-ep2-pp2"),
    *("megatron-etp2", "megatron-ep2-sharded", "megatron-cp2-ep2"),
)
TARGETS = {  # what the adapters of the table's columns act on
    "separate": ("all-linear",),
    "fused": tuple(FUSED),
    "attention": ("q_proj", "v_proj", "o_proj"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A layout of the processes, on a tiny model of a family."""

    layout: str
    family: str


CASES = {
    f"{layout}-{family}": Case(layout=layout, family=family)
    for layouts, families in ((DENSE, ("qwen2", "qwen3")), (SPARSE, ("qwen3_moe",)))
    for family in families
    for layout in layouts
}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        folder = make_tiny(case.family, Path(place) / "model")
        engine = make_engine(case.layout, folder)
        try:
            return _row(engine, case, folder)
        finally:
            engine.close()


def _row(engine: TrainEngine, case: Case, folder: Path) -> Line:
    groups, more = (_groups(seed) for seed in (1, 2))
    batch = weighted_batch("a", groups)
    found: dict[str, Line] = {}
    problems: list[str] = []
    for words, targets in TARGETS.items():
        spec = AdapterSpec(rank=4, alpha=8, target_modules=targets)
        with adapters(engine, a=spec):
            base = engine.logprobs(batch, BASE).logprobs
            oracle = make_oracle(
                case.family, folder, torch.float32, spec, engine.adapter_state("a").tensors
            )
            errors = _errors(engine, batch, groups, oracle)
            errors["steps"] = _after_steps(engine, [groups, more], oracle)
            again = engine.logprobs(batch, BASE).logprobs
        found[words] = errors
        problems += [
            f"{words}: {name} differ by {error:.1e}, {LIMIT:g} is allowed"
            for name, error in errors.items()
            if not error <= LIMIT
        ]
        if not np.array_equal(base, again):
            problems.append(f"{words}: the base model answers otherwise after training")
    return {"errors": found, "problems": problems}


def _groups(seed: int) -> list[tuple[Rollout, ...]]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, 9, [7, 1, 12, 1]), random_group(rng, 3, [4, 5])]


def _errors(
    engine: TrainEngine, batch: Batch, groups: list[tuple[Rollout, ...]], oracle: Oracle
) -> Line:
    """The worst norm of a difference over the norm of what transformers says."""
    rollouts = [r for group in groups for r in group]
    outputs = engine.forward_backward(batch, {"a": GRPO})
    got = look(engine, "a")["a"]
    turns = [t for r in rollouts for t in r.turns]
    expected = torch.cat([pair[0] for pair in turn_logprobs(oracle, turns, 1.0)]).detach()
    grpo_loss(oracle, rollouts).backward()
    return {
        "log-probabilities": _distance(torch.from_numpy(outputs.items.logprobs), expected),
        "gradients": max(_distance(got[n], _grad(p)) for n, p in oracle.parameters.items()),
    }


def _after_steps(
    engine: TrainEngine, steps: list[list[tuple[Rollout, ...]]], oracle: Oracle
) -> float:
    """The adapter after some steps of AdamW, against torch's on transformers' gradients."""
    hyper = AdamHyper(lr=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
    own = list({id(p): p for p in oracle.parameters.values()}.values())
    adam = torch.optim.AdamW(own, lr=1e-2, eps=1e-3, weight_decay=0.1)
    for groups in steps:
        engine.forward_backward(weighted_batch("a", groups), {"a": GRPO})
        engine.optim_step({"a": hyper})
        adam.zero_grad(set_to_none=False)
        grpo_loss(oracle, [r for group in groups for r in group]).backward()
        torch.nn.utils.clip_grad_norm_(own, 0.5)
        adam.step()
    got = engine.adapter_state("a").tensors
    return max(_distance(got[n], p.detach()) for n, p in oracle.parameters.items())


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _distance(got: Tensor, expected: Tensor) -> float:
    size = expected.double().norm()
    away = (got.double() - expected.double()).norm()
    return float(away / size) if size else float(away)


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    names = ("log-probabilities", "gradients", "steps")
    rows = [
        (
            CASES[name].family,
            MEGATRON[CASES[name].layout]["workers"],
            CASES[name].layout.removeprefix("megatron").removeprefix("-") or "one process",
            *(
                f"{max(errors[column] for errors in row['errors'].values()):.1e}"
                for column in names
            ),
        )
        for name, row in found.items()
    ]
    columns = ("family", "processes", "layout", *names)
    return f"""## Megatron's layouts against transformers

Tiny models, fp32, rank 4: the largest norm of a difference over the norm of what transformers says
(with peft, or merged for experts), over all tensors of adapters on
{", ".join(f"{words} layers ({' '.join(targets)})" for words, targets in TARGETS.items())}.
*Steps*: the adapter after two AdamW steps. In no case did the base model's log-probabilities
change by a bit. {LIMIT:g} is allowed.

`make acceptance ARGS=megatron`

{table(columns, rows)}
"""
