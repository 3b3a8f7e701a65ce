"""Fixtures that any test may use."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

# before torch is imported: tiny models are slower on two threads than on one, and the processes
# that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.venvs.recipe import packages
from tests.contract.servers import Servers
from tests.contract.vllm_server import CONTEXT, FAMILIES
from tests.tiny_models import make_tiny, make_tokenizer


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and name the worker of pytest-xdist that a test belongs to."""
    for item in items:
        if _needs(item) and item.get_closest_marker("brief") is None:
            item.add_marker("slow")
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_make_parametrize_id(val: object) -> str | None:
    """Names bytes and long texts by their size: a test's name is the same in every process (what
    a compressor wrote holds the second it was written in) and short enough to read."""
    if isinstance(val, bytes) or (isinstance(val, str) and len(val) > 200):
        return f"{len(val)} {'bytes' if isinstance(val, bytes) else 'characters'}"
    return None


def _needs(item: pytest.Item) -> tuple[str, ...]:
    """The environments that a test needs."""
    return tuple(kind for mark in item.iter_markers("needs") for kind in mark.args)


def _group(item: pytest.Item) -> str:
    """Tests of one group run in one process: those that share servers, engines or folders."""
    for kind in _needs(item):
        if kind in ("sglang", "vllm"):
            return kind
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec is not None else {}
    return f"{item.path}-{params.get('engine')}-{params.get('family')}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [kind for kind in _needs(item) if packages(kind) is None]
    if missing:
        pytest.skip(f"not installed; run `make {' '.join(missing)}`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that was skipped because something is not installed has failed."""
    report = yield
    if os.environ.get("CI") and report.skipped and "run `make" in str(report.longrepr):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 ids with a ChatML template; it encodes any text."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of every family that servers are tested with."""
    root = tmp_path_factory.mktemp("models")
    return {
        family: make_tiny(family, root / family, max_position_embeddings=CONTEXT)
        for family in FAMILIES
    }


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Rollout servers, started when a test asks for one."""
    servers = Servers()
    yield servers
    servers.stop()
