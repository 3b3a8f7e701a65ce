"""What a run was given from outside its folder, by digest, so that a change of it is seen.

{field of the configuration: {what it is made of: digest}}. A field that is not there any more, or
cannot be told without loading it, has no parts; nothing is compared with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lorelei.algo.frozen import RunVersion, frozen_adapters, parse_version
from lorelei.config.env import AgentEnv, PythonEnv, ToolsEnv
from lorelei.config.experiment import Experiment
from lorelei.config.reward import MathVerifyReward, PythonReward, ReasoningGymReward
from lorelei.config.run import RunConfig
from lorelei.config.task import HfTask, ReasoningGymTask
from lorelei.model.fingerprint import file_digest, model_digests
from lorelei.store.change import Change, change
from lorelei.store.durable import StoreError
from lorelei.store.user_code import code_files
from lorelei.store.versions import find_version

Parts = Mapping[str, str]
Inputs = Mapping[str, Parts]

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_FROZEN = (*_ADAPTER, "adapter_model.bin")
_PACKAGES = {"reasoning_gym": "reasoning-gym", "math_verify": "math-verify"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An input that is not what the run was made with."""

    field: str
    recorded: Parts
    found: Parts

    def __str__(self) -> str:
        names = {**self.recorded, **self.found}
        odd = [n for n in names if self.recorded.get(n) != self.found.get(n)]
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        first = "; ".join(f"{name} {self._both(name)}" for name in odd[:3])
        return f"{self.field}: is not what the run was made with: {first}{more}"

    def _both(self, name: str) -> str:
        """Recorded and found, digests shortened."""
        before, after = (parts.get(name, "nothing") for parts in (self.recorded, self.found))
        return f"was {before[:12]}, is {after[:12]}"


def read_inputs(config: RunConfig, model: Path | None) -> Inputs:
    """The inputs as they are now. model: the folder of the base model, None: it is not here.

    Raises StoreError for a file that cannot be read.
    """
    try:
        found: dict[str, Parts] = {"model": model_digests(model) if model else {}}
        for e in config.experiments():
            prefix = f"adapters.{e.name}." if config.adapters else ""
            found |= {f"{prefix}{field}": parts for field, parts in _of_adapter(e)}
    except OSError as error:
        raise StoreError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return found


def differences(recorded: Inputs, found: Inputs) -> list[Difference]:
    """Inputs that changed; those that are not there, or were not recorded, are left out."""
    return [
        Difference(field=field, recorded=parts, found=found[field])
        for field, parts in recorded.items()
        if parts and found.get(field) and parts != found[field]
    ]


def missing(recorded: Inputs, found: Inputs) -> list[str]:
    """Fields of inputs that a resume reads and that are not there."""
    return [
        field
        for field, parts in recorded.items()
        # once a step is committed nobody reads where an adapter started
        if parts and not found.get(field) and not field.endswith("lora.init_from")
    ]


def accepted(recorded: Inputs, found: Inputs, accept: Sequence[str], command: str) -> list[Change]:
    """What changed and was accepted, by field.

    Raises StoreError naming a change that was not, and ValueError for a field that is no input.
    """
    if unknown := [field for field in accept if field not in recorded]:
        raise ValueError(
            f"--accept-changed: {unknown[0]!r} is no input of this run; it has: "
            f"{', '.join(recorded)}"
        )
    changed = differences(recorded, found)
    refused = [d for d in changed if d.field not in accept]
    if refused:
        others = f" (and {', '.join(d.field for d in refused[1:])})" if refused[1:] else ""
        raise StoreError(
            f"{refused[0]}{others}; put it back, or accept it with "
            f"{' '.join(f'--accept-changed {d.field}' for d in refused)}"
        )
    return [change(d.field, d.recorded, d.found, command) for d in changed]


def _of_adapter(e: Experiment) -> Iterator[tuple[str, Parts]]:
    match e.task:
        case ReasoningGymTask():
            yield "task.kind", _package("reasoning_gym")
        case HfTask(path=path):
            yield "task.path", _data_set(path)
        case task:
            yield "task.path", _content(Path(task.path))
    match e.reward:
        case PythonReward(path=path):
            yield "reward.path", _code([path])
        case ReasoningGymReward() | MathVerifyReward() as scorer:
            yield "reward.kind", _package(scorer.kind)
        case _:
            pass
    match e.env:
        case PythonEnv(path=path) | AgentEnv(path=path):
            yield "env.path", _code([path])
        case ToolsEnv(tools=tools):
            yield "env.tools", _code(tools)
        case _:
            pass
    if ".py:" in e.algo.kind:
        yield "algo.kind", _code([e.algo.kind])
    if e.lora.init_from is not None:
        yield "lora.init_from", _adapter(Path(e.lora.init_from), _ADAPTER)
    for field, named in frozen_adapters(e.algo).items():
        version = parse_version(named)
        found = _version(version) if version else _adapter(Path(named), _FROZEN)
        yield f"algo.{field}", found


def _adapter(folder: Path, names: Sequence[str]) -> Parts:
    """Of an adapter's folder; one without its configuration is none."""
    found = _digests(folder / name for name in names)
    return found if _ADAPTER[0] in found else {}


def _version(version: RunVersion) -> Parts:
    found = find_version(version)
    return {"tensors": found.entry.ref.digest if found.entry.ref else found.sha256} if found else {}


def _package(kind: str) -> Parts:
    try:
        return {_PACKAGES[kind]: version(_PACKAGES[kind])}
    except PackageNotFoundError:
        return {}


def _code(functions: Sequence[str]) -> Parts:
    """Names of functions, and digests of the files they are in, by path from the first's folder."""
    parts = {"functions": " ".join(name.rpartition(":")[2] for name in functions)}
    files = [Path(name.rpartition(":")[0]) for name in functions if ".py:" in name]
    for file in files:
        if not file.is_file():
            return {}
        for path in code_files(file):
            parts[str(path.relative_to(file.resolve().parent))] = file_digest(path)
    return parts


def _content(path: Path) -> Parts:
    """Of a file, or of everything in a folder."""
    if path.is_file():
        return {"content": file_digest(path)}
    digest = hashlib.sha256()
    for file in (files := sorted(p for p in path.rglob("*") if p.is_file())):
        digest.update(f"{file.relative_to(path)}\0{file_digest(file)}\n".encode())
    return {"content": digest.hexdigest()} if files else {}


def _data_set(path: str) -> Parts:
    """Of a folder, or the revision of a data set of the hub, as it was last downloaded."""
    if Path(path).is_dir():
        return _content(Path(path))
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "refs" / "main"
    return {"id": path, "revision": ref.read_text().strip()} if ref.is_file() else {}


def _digests(files: Iterator[Path]) -> Parts:
    return {path.name: file_digest(path) for path in files if path.is_file()}
