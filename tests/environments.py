"""Marks tests that need an environment of its own."""

from __future__ import annotations

import pytest


def needs(*kinds: str) -> pytest.MarkDecorator:
    """Skip where one of them is not installed; in CI such a skip fails (conftest.py)."""
    return pytest.mark.needs(*kinds)
