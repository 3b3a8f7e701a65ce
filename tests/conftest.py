"""Fixtures that any test may use."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from tests.contract.servers import Servers
from tests.contract.vllm_server import CONTEXT, FAMILIES
from tests.tiny_models import make_tiny, make_tokenizer


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
