"""A decoding step in one kernel beside the same layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorelei.inference.embedded import decoding
from lorelei.inference.embedded.whole_step import fits
from lorelei.model.kernels.build import library
from lorelei.model.load import load_decoder
from tests.tiny_models import make_tiny
from tests.unit.inference.test_embedded_engine import run
from tests.unit.inference.test_flash_step import CASES, answers

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler for the kernels here")

FITTING: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96, "intermediate_size": 1100},  # no multiple of a panel
    "llama-heads": {"num_key_value_heads": 1, "head_dim": 64},
    "llama-wide-heads": {"num_key_value_heads": 4, "head_dim": 128},
    "qwen2": {},  # biases of q, k and v
    "qwen3": {},  # norms of q and k
}


@pytest.mark.parametrize("max_running", [5, 64])
@pytest.mark.parametrize(("adapters", "base"), CASES[1:])
@pytest.mark.parametrize("model", FITTING)
def test_a_whole_step_is_its_layers_one_by_one(
    model: str,
    adapters: int,
    base: bool,
    max_running: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_tiny(model.partition("-")[0], tmp_path / model, **FITTING[model])
    decoder = load_decoder(folder)
    assert fits(decoder)
    whole = run(answers(decoder, adapters, base, max_running))
    monkeypatch.setattr(decoding, "fits", lambda _: False)
    by_layer = run(answers(decoder, adapters, base, max_running))
    for (tokens, sampled, scored), (expected, others, _) in zip(whole, by_layer, strict=True):
        assert tokens == expected
        torch.testing.assert_close(sampled, others, rtol=0, atol=2e-5)
        torch.testing.assert_close(sampled, scored, rtol=0, atol=2e-5)


def test_its_bits_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    decoder = load_decoder(make_tiny("qwen3", tmp_path / "qwen3"))
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            rows = run(answers(decoder, 3, True, 64))
            found.append([(tokens, sampled.tolist()) for tokens, sampled, _ in rows])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("family", "config"), [("qwen3_moe", {}), ("llama", {"attention_bias": True})]
)
def test_other_decoders_go_layer_by_layer(
    family: str, config: dict[str, Any], tmp_path: Path
) -> None:
    assert not fits(load_decoder(make_tiny(family, tmp_path / family, **config)))
