"""A vLLM server that the contract suites share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.servers import Servers
from tests.contract.train_engines import MATRIX
from tests.contract.vllm_server import CONTEXT, RunningServer, running_vllm


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec is not None else {}
        engine = params.get("engine", params.get("make"))
        if (engine, params.get("family", params.get("folder"))) in MATRIX:
            item.add_marker("matrix")


@pytest.fixture(scope="package", autouse=True)
def _servers_end(servers: Servers) -> Iterator[None]:
    """Nobody behind these suites needs them."""
    yield
    servers.stop()


@pytest.fixture(scope="package")
def vllm_server(
    folders: dict[str, Path], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    tiny_tokenizer.save_pretrained(folders["llama"])
    with running_vllm(folders["llama"], tmp_path_factory.mktemp("vllm"), CONTEXT) as server:
        yield server
