"""A JSON record of the run folder: one object with a format number and its own sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from lorelei.algo.kinds import DEFAULT, KINDS
from lorelei.config.optimizer import OptimizerConfig
from lorelei.store.durable import CorruptFile, StoreError, read_file

T = TypeVar("T")

FORMAT = 2
Body = dict[str, Any]


def _one_job_per_adapter(body: Body) -> Body:
    """Format 1 knew RL only: its state was spread over the records of adapters and the loop's."""
    if "adapters" in body and "files" in body:
        return _manifest_of_jobs(body)
    if "config" in body:
        return {**body, "config": _config_of_kinds(body["config"])}
    return body


def _manifest_of_jobs(body: Body) -> Body:
    loop: Body = body["state"]
    scores: Body = loop.get("score") or {}
    adapters: Body = {}
    for name, entry in body["adapters"].items():
        record: Body = dict(entry["record"])
        state: Body = {
            "next_index": record.pop("data_position"),
            "pending": record.pop("admission").get("pending", []),
            "reward": loop.get("reward"),
            "score": scores.get(name),
        }
        adapters[name] = {**entry, "record": {**record, "state": state}}
    return {**body, "adapters": adapters, "state": {"finished": bool(loop.get("finished"))}}


def _config_of_kinds(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields of `algo` that its kind does not have: they had no effect.

    Format 1 knew one set of fields for all kinds, those of the optimizer among them, which stay:
    they go on to be read there.
    """
    entries = cast(Mapping[str, Mapping[str, Any]], config.get("adapters") or {})
    adapters = {name: _without_unused(entry) for name, entry in entries.items()}
    return {**_without_unused(config), "adapters": adapters}


def _without_unused(sections: Mapping[str, Any]) -> dict[str, Any]:
    algo: Mapping[str, Any] | None = sections.get("algo")
    if algo is None:
        return dict(sections)
    chosen = KINDS[algo.get("kind", DEFAULT)]
    known = {*chosen.model_fields, *OptimizerConfig.model_fields}
    return {**sections, "algo": {key: value for key, value in algo.items() if key in known}}


# n: from n to n + 1
MIGRATIONS: Mapping[int, Callable[[Body], Body]] = {1: _one_job_per_adapter}


def record_bytes(body: Mapping[str, Any]) -> bytes:
    """`body` with `format` and `sha256` added. Raises ValueError for what is not plain JSON."""
    try:
        # the checksum is over what a reader will parse: string keys, lists for tuples
        plain = json.loads(json.dumps({"format": FORMAT, **body}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"run record: {error}; only strings, finite numbers, lists and dicts can be stored"
        ) from error
    return json.dumps({**plain, "sha256": _checksum(plain)}, indent=1).encode() + b"\n"


def read_record(path: Path) -> dict[str, Any]:
    """The body (with its sha256), migrated to FORMAT.

    Raises CorruptFile, and StoreError for a format this version cannot read.
    """
    body = json_object(read_file(path), path)
    check_format(body, path)  # first: a newer lorelei may compute the checksum in another way
    checksum = body.pop("sha256", None)
    if checksum != _checksum(body):
        raise CorruptFile(f"{path}: damaged: its sha256 does not match its content")
    return {**migrate(body, path), "sha256": checksum}


def json_object(data: bytes | str, path: Path) -> dict[str, Any]:
    """Raises CorruptFile naming `path`."""
    try:
        parsed: Any = json.loads(data)
    except ValueError as error:
        raise CorruptFile(f"{path}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise CorruptFile(f"{path}: not a JSON object")
    return cast(dict[str, Any], parsed)


def check_format(body: Mapping[str, Any], path: Path) -> int:
    """The format number. Raises StoreError for a newer one, CorruptFile for none."""
    version = body.get("format")
    if not isinstance(version, int):
        raise CorruptFile(f"{path}: format: {version!r} is not a number")
    if version > FORMAT:
        raise StoreError(
            f"{path}: format {version} is newer than {FORMAT}, the newest that this version "
            "reads; upgrade lorelei"
        )
    return version


def migrate(body: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bring an older record to FORMAT, one version at a time. Raises StoreError."""
    while (version := check_format(body, path)) < FORMAT:
        if version not in MIGRATIONS:
            raise StoreError(
                f"{path}: format {version} is too old; read it with an earlier lorelei"
            )
        body = {**MIGRATIONS[version](body), "format": version + 1}
    return body


def parse_record(kind: TypeAdapter[T], body: Mapping[str, Any], path: Path) -> T:
    """The body as a dataclass; types are strict. Raises CorruptFile naming the field."""
    try:
        return kind.validate_json(json.dumps(body), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{path}: {field}: {first['msg']}") from error


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
