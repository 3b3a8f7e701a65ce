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


def bank_of(decoder: Decoder, names: str) -> AdapterBank:
    bank = AdapterBank(decoder)
    for seed, name in enumerate(names):
        bank.add(name, AdapterSpec(rank=4, alpha=8.0), seed)
    return bank


def states_of(bank: AdapterBank, names: str) -> dict[str, AdapterState]:
    return {name: bank.state(name) for name in names}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")


def run(body: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(body, 60))


def test_a_published_version_is_served_until_it_is_retired(folder: Path) -> None:
    decoder = load_decoder(folder)
    bank = bank_of(decoder, "ab")

    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        publisher = VersionPublisher(engine, "run7")
        refs = await publisher.publish({"a": 1, "b": 4}, states_of(bank, "ab"))
        assert {str(ref) for ref in refs.values()} == {"a@v1", "b@v4"}
        assert refs["a"].digest == bank.state("a").digest()
        served = (await engine.health()).adapters
        assert served == tuple(sorted(ref.served_name for ref in refs.values()))
        # training goes on; the published version stays what it was
        tokens = np.arange(3, 20, dtype=np.int32)
        (before,) = await engine.score([tokens], refs["a"])
        with torch.no_grad():
            for tensor in bank["a"].tensors().values():
                tensor.normal_()
        (after,) = await engine.score([tokens], refs["a"])
        assert before.tobytes() == after.tobytes()
        await publisher.retire(refs["a"])
        assert (await engine.health()).adapters == (refs["b"].served_name,)
        await engine.close()

    run(body())


def test_a_copy_that_differs_is_an_error_and_nothing_stays(folder: Path) -> None:
    # an engine in fp32 cannot hold an fp64 adapter as it is
    states = states_of(bank_of(load_decoder(folder, torch.float64), "a"), "a")

    async def body() -> None:
        engine = EmbeddedEngine(load_decoder(folder))
        with pytest.raises(PublishError, match=r"a@v1: .*installed"):
            await VersionPublisher(engine, "run").publish({"a": 1}, states)
        assert (await engine.health()).adapters == ()
        await engine.close()

    run(body())


def test_one_adapter_that_fails_takes_the_others_back(folder: Path) -> None:
    decoder = load_decoder(folder)
    bank = bank_of(decoder, "ab")
    with torch.no_grad():
        next(iter(bank["b"].tensors().values())).fill_(torch.nan)

    async def body() -> None:
        engine = EmbeddedEngine(decoder)
        with pytest.raises(PublishError, match=r"b@v1: .*not finite"):
            await VersionPublisher(engine, "run").publish({"a": 1, "b": 1}, states_of(bank, "ab"))
        assert (await engine.health()).adapters == ()
        await engine.close()

    run(body())
