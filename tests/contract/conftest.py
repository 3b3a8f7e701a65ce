"""Tiny models and servers that the contract suites share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.servers import Servers
from tests.contract.vllm_server import CONTEXT, FAMILIES, RunningServer, running_vllm
from tests.tiny_models import make_tiny


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="package")
def servers() -> Iterator[Servers]:
    servers = Servers()
    yield servers
    servers.stop()


@pytest.fixture(scope="package")
def vllm_server(
    folders: dict[str, Path], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    tiny_tokenizer.save_pretrained(folders["llama"])
    with running_vllm(folders["llama"], tmp_path_factory.mktemp("vllm"), CONTEXT) as server:
        yield server
