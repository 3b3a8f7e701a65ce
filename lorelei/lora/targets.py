"""Which linear layers of a model get an adapter, and which share their A. No torch.

The names are those of the checkpoint, such as 'model.layers.0.self_attn.q_proj'; each expert of a
mixture counts as a layer. A router is never adapted and has no entry.

Megatron's names mean its fused layers: `linear_qkv` is q, k and v with one A for all three, which
every engine keeps tied.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorelei.model.config import DecoderConfig
from lorelei.types import AdapterSpec

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
FUSED = {  # Megatron's name -> the last parts of the names it stands for
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}

Shape = tuple[int, int]  # (out, in)


def module_shapes(hf_config: Mapping[str, Any]) -> dict[str, Shape]:
    """{name: (out, in)} of every linear layer that can get an adapter, in order of execution.

    hf_config: a parsed config.json. Raises UnsupportedModel for architectures we do not build.
    """
    model = DecoderConfig.from_hf(hf_config)
    hidden, queries = model.hidden, model.heads * model.head_dim
    keys = model.kv_heads * model.head_dim
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    shapes: dict[str, Shape] = {}
    for layer in range(model.layers):
        prefix, width, mlps = f"model.layers.{layer}", model.intermediate, ["mlp"]
        if model.moe is not None and model.moe.is_sparse(layer):
            width = model.moe.intermediate
            mlps = [f"mlp.experts.{expert}" for expert in range(model.moe.experts)]
        shapes |= {f"{prefix}.self_attn.{leaf}": shape for leaf, shape in attention.items()}
        for mlp in mlps:
            shapes[f"{prefix}.{mlp}.gate_proj"] = (width, hidden)
            shapes[f"{prefix}.{mlp}.up_proj"] = (width, hidden)
            shapes[f"{prefix}.{mlp}.down_proj"] = (hidden, width)
    shapes[HEAD] = (model.vocab, hidden)
    return shapes


def match_targets(names: Iterable[str], spec: AdapterSpec, model_name: str) -> list[str]:
    """The names that `spec` targets, in their order.

    A target is 'all-linear' (everything but lm_head), a name, the end of one after a dot, one of
    FUSED, or a regular expression for whole names; exclude_modules are written alike and win.
    Raises ValueError when a target or an exclusion matches nothing, or nothing is left.
    """
    known = list(names)
    chosen: set[str] = set()
    for target in spec.target_modules:
        chosen |= _matches(known, target, "lora.target_modules", model_name)
    for target in spec.exclude_modules:
        chosen -= _matches(known, target, "lora.exclude_modules", model_name)
    if not chosen:
        raise ValueError(
            f"lora.exclude_modules: {list(spec.exclude_modules)} leaves nothing of "
            f"lora.target_modules: {list(spec.target_modules)}; exclude less"
        )
    return [name for name in known if name in chosen]


def module_patterns(modules: Iterable[str]) -> list[str]:
    """Targets that match exactly these modules of a model whose experts are all in or all out."""
    layers: dict[str, set[str]] = {}  # what is targeted in a layer -> such layers
    alone: list[str] = []
    by_layer: dict[str, set[str]] = {}
    for module in modules:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
            leaf = re.sub(r"\.\d+\.", r".\\d+.", match[2])
            by_layer.setdefault(match[1], set()).add(leaf)
        else:
            alone.append(module)
    for layer, leaves in by_layer.items():
        layers.setdefault("|".join(sorted(leaves)), set()).add(layer)
    found = [
        rf"model\.layers\.({'|'.join(sorted(numbers, key=int))})\.({leaves})"
        for leaves, numbers in layers.items()
    ]
    return [*sorted(found), *sorted(alone)]


def tied_names(chosen: Iterable[str], spec: AdapterSpec) -> dict[str, str]:
    """{targeted name: what its A is called}: names that share an A have one for it in common.

    A name that a fused target covers is tied, whatever else targets it.
    """
    fused = {
        leaf: target
        for target in spec.target_modules
        for leaf in FUSED.get(target, ())
        if len(FUSED[target]) > 1
    }
    called: dict[str, str] = {}
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        called[name] = f"{parent}.{fused[leaf]}" if leaf in fused else name
    sharing = Counter(called.values())
    return {name: a if sharing[a] > 1 else name for name, a in called.items()}


def _matches(names: Sequence[str], target: str, field: str, model_name: str) -> set[str]:
    if target == ALL_LINEAR:
        return {name for name in names if name != HEAD}
    if target in FUSED:
        found = {name for name in names if name.rpartition(".")[2] in FUSED[target]}
        if found:
            return found
    found = {name for name in names if name == target or name.endswith(f".{target}")}
    if found:
        return found
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise ValueError(f"{field}: {target!r} is not a regular expression: {error}") from error
    found = {name for name in names if pattern.fullmatch(name)}
    if not found:
        raise ValueError(
            f"{field}: {target!r} matches no linear layer of {model_name}; "
            f"{_suggestion(names, target)}"
        )
    return found


def _suggestion(names: Sequence[str], target: str) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in names})
    choices = names if "." in target else [*leaves, *FUSED]
    close = difflib.get_close_matches(target, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(leaves)}"
