"""LoRA on the experts of a mixture, in peft's form for transformers 5.

transformers 5 holds all experts of a layer in two parameters, `experts.gate_up_proj` [E, 2I, D] and
`experts.down_proj` [E, D, I]; peft adapts those as `target_parameters`, and silently drops tensors
of single experts before its version 0.19. Gate and up become one product of both ranks, with a
block of B for each. Up to 0.18 peft took the last two axes the other way round, so that its A is
our B transposed.

Shapes: E experts, R rank, D inputs, O outputs. A is [R, D] and B [O, R] of one expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorelei.lora.state import PREFIX, AdapterState, tensor_names
from lorelei.lora.tensor_file import lora_modules

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FORMS = {"fused": "0.19.0", "fused-0.18": "0.18.1"}  # the peft that reads each
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)")
_LEAVES = (".gate_proj", ".up_proj", ".down_proj")
_ANY_EXPERT = re.compile(r".+\.experts\.\d+\..+")

Factors = tuple[Tensor, Tensor]  # A and B


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """What replaces the tensors of single experts, and the fields of adapter_config.json."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]


def has_experts(modules: Iterable[str]) -> bool:
    """Whether any of the modules is an expert of a mixture."""
    return any(_ANY_EXPERT.fullmatch(module) for module in modules)


def fuse_experts(state: AdapterState, experts: int, form: str) -> Fused:
    """The adapter with its experts fused.

    experts: of each layer of the base; those without an adapter get zeros. form: one of FORMS.
    Raises ValueError for experts that have another name or number, or what peft would lose.
    """
    spec, rest = state.spec, dict(state.tensors)
    found: dict[str, dict[str, dict[int, Factors]]] = {}
    plain: list[str] = []
    for module in lora_modules(rest, spec.rank):
        match = _EXPERT.fullmatch(module)
        strange = has_experts([module]) if match is None else int(match[2]) >= experts
        if strange:
            raise ValueError(f"{module} is not one of {experts} experts with gate, up and down")
        if match is None:
            if form == "fused" and module.endswith(_LEAVES):
                raise ValueError(
                    f"{module} is of a dense layer, which peft from 0.19 on takes for experts and "
                    "drops"
                )
            plain.append(module)
            continue
        a, b = (rest.pop(name) for name in tensor_names(module))
        found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = (a, b)
    targets: list[str] = []
    ranks: dict[str, int] = {}
    for container, leaves in found.items():
        names = [p for p, parts in PARTS.items() if any(part in leaves for part in parts)]
        for name in names:
            parts = [leaves.get(part, {}) for part in PARTS[name]]
            a_ERD, b_EOR = _stacked(parts, experts, spec.rank)
            # the parameter that peft wraps first is inside the other's wrapper
            inner = ".base_layer" if len(names) > 1 and name == names[0] else ""
            name_a, name_b = tensor_names(container + inner)
            rest[name_a], rest[name_b] = _to_peft(a_ERD, b_EOR, form)
            targets.append(f"{container}.{name}")
            ranks[targets[-1]] = a_ERD.shape[1]
    # alpha such that the scale stays that of the adapter
    power = 0.5 if spec.rslora else 1.0
    wider = {target: rank for target, rank in ranks.items() if rank != spec.rank}
    config = {
        "target_modules": plain,
        "target_parameters": targets,
        "rank_pattern": wider,
        "alpha_pattern": {t: spec.alpha * (r / spec.rank) ** power for t, r in wider.items()},
        "lora_dropout": 0.0,  # peft refuses another on parameters
        "peft_version": FORMS[form],
    }
    return Fused(tensors=dict(sorted(rest.items())), config=config)


def separate_experts(
    tensors: Mapping[str, Tensor], ranks: Mapping[str, int], rank: int, version: str | None
) -> dict[str, Tensor]:
    """The tensors of single experts in place of fused ones.

    ranks: of each fused parameter by full name. rank: of the other modules. version: of the peft
    that wrote it. Raises ValueError for tensors that do not fit.
    """
    rest, made = dict(tensors), dict[str, Tensor]()
    for container in sorted({name.rpartition(".")[0] for name in ranks}):
        names = [p for p in PARTS if f"{container}.{p}" in ranks]
        pairs: dict[str, Factors] = {}
        for name in names:
            inner = ".base_layer" if len(names) > 1 and name == names[0] else ""
            try:
                a, b = (rest.pop(tensor) for tensor in tensor_names(container + inner))
            except KeyError as missing:
                raise ValueError(f"tensor {missing.args[0]} is missing") from None
            pairs[name] = a, b
        form = _form(pairs, version)
        for name, (a, b) in pairs.items():
            wide = ranks[f"{container}.{name}"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % wide:
                raise ValueError(
                    f"{container}.{name}: A {list(a.shape)} and B {list(b.shape)} do not fit "
                    f"rank {wide}"
                )
            for module, pair in _separate(name, _from_peft(a, b, wide, form), rank):
                made |= zip(tensor_names(f"{container}.{module}"), pair, strict=True)
    return rest | made


def fused_parameters(tensors: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The full names of the parameters that `target_parameters` means, of those with tensors.

    Raises ValueError for one that is none of an expert's.
    """
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    containers = {m.removesuffix(".base_layer") for m in modules if ".experts" in m}
    found: set[str] = set()
    for target in targets:
        if target.rpartition(".")[2] not in PARTS:
            raise ValueError(f"{target!r} is not {' or '.join(PARTS)} of a mixture's experts")
        full = {f"{c}.{p}" for c in containers if c.endswith(".experts") for p in PARTS}
        found |= {name for name in full if name == target or name.endswith(f".{target}")}
    return sorted(found)


def _stacked(parts: list[dict[int, Factors]], experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [E, R, D] and B [E, O, R] of parts beside each other; a part without tensors has no rank.

    Gate and up have equally many outputs.
    """
    some_a, some_b = next(pair for part in parts for pair in part.values())
    outputs, present = len(some_b), [i for i, part in enumerate(parts) if part]
    a_ERD = some_a.new_zeros(experts, rank * len(present), some_a.shape[1])
    b_EOR = some_b.new_zeros(experts, outputs * len(parts), rank * len(present))
    for column, row in enumerate(present):
        ranks = slice(column * rank, (column + 1) * rank)
        for expert, (a, b) in parts[row].items():
            a_ERD[expert, ranks] = a
            b_EOR[expert, row * outputs : (row + 1) * outputs, ranks] = b
    return a_ERD, b_EOR


def _to_peft(a_ERD: Tensor, b_EOR: Tensor, form: str) -> Factors:
    if form == "fused-0.18":
        a_ERD, b_EOR = b_EOR.mT, a_ERD.mT
    return a_ERD.flatten(0, 1).contiguous(), b_EOR.permute(1, 2, 0).flatten(1).contiguous()


def _from_peft(a: Tensor, b: Tensor, rank: int, form: str) -> Factors:
    a_ERD = a.reshape(-1, rank, a.shape[1])
    b_EOR = b.reshape(len(b), rank, -1).permute(2, 0, 1)
    return (b_EOR.mT, a_ERD.mT) if form == "fused-0.18" else (a_ERD, b_EOR)


def _form(pairs: Mapping[str, Factors], version: str | None) -> str:
    """Which axes came first: by the shapes, or by peft's version where they do not say it."""
    if len(pairs) == 2:
        (up_a, up_b), (down_a, down_b) = (pairs[name] for name in PARTS)
        new = (up_a.shape[1], up_b.shape[0]) == (down_b.shape[0], 2 * down_a.shape[1])
        return "fused" if new else "fused-0.18"
    numbers = re.match(r"(\d+)\.(\d+)", version or "")  # from 0.18 on peft writes its version
    new = numbers is not None and (int(numbers[1]), int(numbers[2])) >= (0, 19)
    return "fused" if new else "fused-0.18"


def _separate(name: str, pair: Factors, rank: int) -> Iterable[tuple[str, Factors]]:
    """('0.gate_proj', (A, B)) and so on."""
    a_ERD, b_EOR = pair
    parts, half = PARTS[name], rank
    outputs = b_EOR.shape[1] // len(parts)
    upper, lower = b_EOR[:, :outputs], b_EOR[:, outputs:]
    blocks = a_ERD.shape[1] == len(parts) * half and not (
        upper[..., half:].any() or lower[..., :half].any()
    )
    for i, part in enumerate(parts):
        # not in blocks: gate and up share their A
        ranks = slice(i * half, (i + 1) * half) if blocks else slice(None)
        for expert in range(len(a_ERD)):
            b = b_EOR[expert, i * outputs : (i + 1) * outputs, ranks].contiguous()
            yield f"{expert}.{part}", (a_ERD[expert, ranks].contiguous(), b)


def lost(state: AdapterState, back: Mapping[str, Tensor]) -> str | None:
    """The first tensor of the adapter that `back` does not hold as it is."""
    for name, tensor in state.tensors.items():
        if name not in back or not torch.equal(back[name], tensor):
            return name
    return None
