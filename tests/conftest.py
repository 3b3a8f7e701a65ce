"""Fixtures that any test may use."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.contract.servers import Servers
from tests.contract.vllm_server import CONTEXT, FAMILIES
from tests.tiny_models import make_tiny

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["What is the sum of 12 and 30? The answer is 42.", "user assistant system question"]


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
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


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
