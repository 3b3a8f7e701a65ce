"""Where models are on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from lorelei.cache import cache_folder
from lorelei.config.errors import ConfigError

WEIGHTS = "*.safetensors"
# what a run reads of a model; no pickled weights
_FILES = ["*.json", WEIGHTS, "*.jinja", "*.txt", "*.model"]


def resolve_model(name: str, *, weights: bool = True) -> Path:
    """The folder of a model: a folder, Lorelei's cache, the Hugging Face cache, then the hub.

    weights: False asks for config.json only, and downloads nothing else.
    Raises ConfigError when it is nowhere.
    """
    if (folder := local_folder(name)) is not None:
        return _complete(folder, name, weights)
    cached = _cached(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"model: there is no folder {name!r}; write a folder or a hub id")
    return _complete(_from_hub(name, cached, weights), name, weights)


def find_model(name: str) -> Path | None:
    """The folder of a model that is on this machine; nothing is downloaded."""
    if (folder := local_folder(name)) is not None:
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a folder that is not there
        return None
    return Path(config).parent if isinstance(config, str) else None


def local_folder(name: str) -> Path | None:
    """The folder of a model on this machine, if there is one outside of the hub's cache."""
    # os.path: a folder that may not be looked into, or a user without a home, is no error
    folders = (os.path.expanduser(name), _cached(name))
    return next((Path(folder) for folder in folders if os.path.isdir(folder)), None)


def _cached(name: str) -> Path:
    return cache_folder() / "models" / name.replace("/", "--")


def _from_hub(name: str, cached: Path, weights: bool) -> Path:
    from huggingface_hub import (
        snapshot_download,  # pyright: ignore[reportUnknownVariableType]
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        if not weights:
            config = try_to_load_from_cache(name, "config.json")
            if isinstance(config, str):
                return Path(config).parent
        return Path(snapshot_download(name, allow_patterns=_FILES if weights else ["config.json"]))
    except HFValidationError as error:
        raise ConfigError(f"model: {name!r} is neither a folder nor a hub id (org/name)") from error
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"model: {name!r} is not in {cached} nor in the Hugging Face cache, and the hub cannot "
            "be reached; run `make model`, go online, or give a folder"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"model: the Hugging Face hub does not give {name!r} ({reason}); "
            "check the name, or log in with `hf auth login`"
        ) from error


def _complete(folder: Path, name: str, weights: bool) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model: {name!r} is the folder {folder}, which has no config.json")
    if weights and not any(folder.glob(WEIGHTS)):
        raise ConfigError(
            f"model: {name!r} is the folder {folder}, which has no *.safetensors; "
            "download it again, or convert its weights"
        )
    return folder
