"""Marks tests that need an environment of its own."""

from __future__ import annotations

import pytest

from lorelei.venvs.recipe import packages


def needs(*kinds: str) -> pytest.MarkDecorator:
    """Skip where one of them is not installed; in CI such a skip fails (conftest.py)."""
    missing = [kind for kind in kinds if packages(kind) is None]
    command = f"run `make {' '.join(missing)}`"
    return pytest.mark.skipif(bool(missing), reason=f"not installed; {command}")
