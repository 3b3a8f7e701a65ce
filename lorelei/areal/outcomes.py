"""What becomes of every example file of a checkout of AReaL, for docs/areal.md."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorelei.config.errors import ConfigError
from lorelei.run_file import load_config

LOADS = "loads"
_TO_LORA = re.compile(r"is full fine-tuning, .* for LoRA give `([^`]*)`")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one file."""

    file: str  # relative to the folder
    refusal: str  # the line; empty: it loads
    overrides: Sequence[str]  # that the refusal of full fine-tuning gives for LoRA
    then: str  # what follows with them; empty: it loads


def outcomes(folder: Path) -> list[Outcome]:
    """Of all YAML files below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml"))
    return [_outcome(path, folder) for path in files]


def section(found: Sequence[Outcome], commit: str) -> str:
    """The page's part about them. commit: of the checkout."""
    full = [one for one in found if one.overrides]
    count = Counter(
        {
            "load as they are": sum(not one.refusal for one in found),
            "load with LoRA's overrides": sum(not one.then for one in full),
            "are refused with them": sum(bool(one.then) for one in full),
            "are refused for another reason": sum(
                bool(one.refusal) and not one.overrides for one in found
            ),
        }
    )
    numbers = ", ".join(f"{number} {what}" for what, number in count.items())
    lines = [
        f"All {len(found)} YAML files of AReaL's `examples` at its commit `{commit[:12]}`:",
        f"{numbers}.",
        "Of files for full fine-tuning, the last column says what follows with the overrides that "
        "their refusal gives.",
        "",
        "| file | as it is | with LoRA |",
        "| --- | --- | --- |",
        *(f"| `{one.file}` | {_first(one)} | {_second(one)} |" for one in found),
    ]
    return "\n".join(lines)


def _outcome(path: Path, folder: Path) -> Outcome:
    refusal = _refusal(path, ())
    match = _TO_LORA.search(refusal)
    overrides = tuple(match[1].split()) if match else ()
    then = _refusal(path, overrides) if overrides else ""
    name = path.relative_to(folder).as_posix()
    return Outcome(file=name, refusal=refusal, overrides=overrides, then=then)


def _refusal(path: Path, overrides: Sequence[str]) -> str:
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def _first(one: Outcome) -> str:
    if one.overrides:
        return "full fine-tuning"
    return _cell(one.refusal) or LOADS


def _second(one: Outcome) -> str:
    if not one.overrides:
        return ""
    return _cell(one.then) or LOADS


def _cell(line: str) -> str:
    return line.replace("|", "\\|")
