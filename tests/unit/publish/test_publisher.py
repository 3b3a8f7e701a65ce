"""Publishing from a train engine to the embedded engine of the same process."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.lora.bank import AdapterBank
from lorelei.lora.state import AdapterState
from lorelei.model.decoder import Decoder
from lorelei.model.load import load_decoder
from lorelei.publish.contract import PublishError
from lorelei.publish.publisher import VersionPublisher
from lorelei.types import AdapterSpec
from tests.tiny_models import make_tiny

T = TypeVar("T")


class Source:
    """The one method of a TrainEngine that publishing needs, on a bank of adapters."""

    def __init__(self, decoder: Decoder, names: list[str]) -> None:
        self.bank = AdapterBank(decoder)
        for seed, name in enumerate(names):
            self.bank.add(name, AdapterSpec(rank=4, alpha=8.0), seed)

    def adapter_state(self, name: str) -> AdapterState:
        return self.bank.state(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 60))


def test_a_published_version_is_served_until_it_is_retired(folder: Path) -> None:
    decoder = load_decoder(folder)
    source = Source(decoder, ["a", "b"])

    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        publisher = VersionPublisher(engine, "run7")
        refs = await publisher.publish(source, {"a": 1, "b": 4})  # type: ignore[arg-type]
        assert {str(ref) for ref in refs.values()} == {"a@v1", "b@v4"}
        assert refs["a"].digest == source.adapter_state("a").digest()
        served = (await engine.health()).adapters
        assert served == tuple(sorted(ref.served_name for ref in refs.values()))
        # training goes on; the published version stays what it was
        tokens = np.arange(3, 20, dtype=np.int32)
        (before,) = await engine.score([tokens], refs["a"])
        with torch.no_grad():
            for tensor in source.bank["a"].tensors().values():
                tensor.normal_()
        (after,) = await engine.score([tokens], refs["a"])
        assert before.tobytes() == after.tobytes()
        await publisher.retire(refs["a"])
        assert (await engine.health()).adapters == (refs["b"].served_name,)
        await engine.close()

    run(body())


def test_a_copy_that_differs_is_an_error_and_nothing_stays(folder: Path) -> None:
    # an engine in fp32 cannot hold an fp64 adapter as it is
    source = Source(load_decoder(folder, torch.float64), ["a"])

    async def body() -> None:
        engine = EmbeddedEngine(load_decoder(folder))
        with pytest.raises(PublishError, match=r"a@v1: .*installed"):
            await VersionPublisher(engine, "run").publish(source, {"a": 1})  # type: ignore[arg-type]
        assert (await engine.health()).adapters == ()
        await engine.close()

    run(body())


def test_one_adapter_that_fails_takes_the_others_back(folder: Path) -> None:
    decoder = load_decoder(folder)
    source = Source(decoder, ["a", "b"])
    with torch.no_grad():
        next(iter(source.bank["b"].tensors().values())).fill_(torch.nan)

    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        with pytest.raises(PublishError, match=r"b@v1: .*not finite"):
            await VersionPublisher(engine, "run").publish(source, {"a": 1, "b": 1})  # type: ignore[arg-type]
        assert (await engine.health()).adapters == ()
        await engine.close()

    run(body())
