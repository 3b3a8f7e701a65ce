"""The frozen adapters that algorithms name: read from where they are, held by the train engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorelei.algo.frozen import RunVersion, frozen_adapters, parse_version
from lorelei.config.run import RunConfig
from lorelei.lora.origin import Origin, read_origin
from lorelei.lora.peft_folder import read_peft_folder
from lorelei.lora.state import AdapterState
from lorelei.model.locate import resolve_model
from lorelei.store.identity import read_identity
from lorelei.store.snapshot import read_snapshot
from lorelei.store.versions import find_version
from lorelei.train.contract import TrainEngine
from lorelei.types import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenAdapter:
    """An adapter that is compared with and never trained."""

    field: str  # of the configuration; of several that name it, the first
    policy: Policy
    state: AdapterState


def named_adapters(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(field, what it names) of every setting of an algorithm that names an adapter."""
    for e in config.experiments():
        prefix = f"adapters.{e.name}." if config.adapters else ""
        for field, named in frozen_adapters(e.algo).items():
            yield f"{prefix}algo.{field}", named


def read_frozen(config: RunConfig) -> list[FrozenAdapter]:
    """Each adapter once. Raises ValueError naming the field and what is missing or damaged."""
    found: dict[Policy, FrozenAdapter] = {}
    for field, named in named_adapters(config):
        if named not in found:
            state = read_adapter(field, named, config.model)
            found[named] = FrozenAdapter(field=field, policy=named, state=state)
    return list(found.values())


def read_adapter(field: str, named: str, model: str) -> AdapterState:
    """What a field names. Raises ValueError naming the field and what is missing or damaged."""
    version = parse_version(named)
    try:
        if version is None:
            return read_peft_folder(Path(named), resolve_model(model))
        return _read_version(version)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def hold_all(engine: TrainEngine, adapters: Iterable[FrozenAdapter]) -> None:
    """Raises ValueError naming the field of an adapter that does not fit the model."""
    for adapter in adapters:
        try:
            engine.hold(adapter.policy, adapter.state)
        except ValueError as error:
            raise ValueError(f"{adapter.field}: {error}") from error


def origin_of(named: str) -> Origin:
    """The base model of an adapter that a field names. Raises StoreError."""
    version = parse_version(named)
    if version is None:
        return read_origin(Path(named))
    identity = read_identity(version.run)
    return Origin(
        base=(identity.inputs or {}).get("model", {}), name=str(identity.config.get("model"))
    )


def _read_version(version: RunVersion) -> AdapterState:
    found = find_version(version)
    if found is None:
        raise ValueError(
            f"{version.run}: no checkpoint has {version.adapter}@v{version.version}; write one "
            "that it has with `lorelei export`, and name that folder"
        )
    state = read_snapshot(found.path, found.sha256).state
    ref = found.entry.ref
    if ref is not None and ref.digest != state.digest():
        raise ValueError(
            f"{version.run}: its checkpoint was trained on since {ref} was published; write it "
            "with `lorelei export`, and name that folder"
        )
    if state.spec.full:
        raise ValueError(f"{version.run}: {version.adapter} is full weights, and not an adapter")
    return state
