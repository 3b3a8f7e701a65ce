"""Shapes of well-known models, so that runs can be planned without their weights or the hub.

Each folder holds what a plan reads of the model's config.json.
"""

from __future__ import annotations

from pathlib import Path

from lorelei.model.locate import local_folder, resolve_model

SHAPES = Path(__file__).parent


def find_shape(name: str) -> Path:
    """A folder with the config.json of a model: its own, else ours, else the hub's.

    Raises ConfigError when it is nowhere.
    """
    ours = SHAPES / name.replace("/", "--")
    if local_folder(name) is None and ours.is_dir():
        return ours
    return resolve_model(name, weights=False)
