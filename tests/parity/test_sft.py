"""Supervised fine-tuning against transformers and peft, and beside RL in one mixed step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lorelei.config.task import JsonlTask
from lorelei.data.examples import ExampleSource
from lorelei.data.source import make_examples
from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
from lorelei.train.archon.engine import archon_engine
from lorelei.train.batch import example_batch
from lorelei.train.contract import TrainEngine
from lorelei.train.step import run_works
from lorelei.train.work import Round, Work
from lorelei.types import AdamHyper, AdapterSpec, Example, LossSpec
from tests.contract.train_engines import DECOUPLED, adapters, assert_close, look, randomise
from tests.decoders import load_decoder
from tests.episodes import random_group, weighted_batch
from tests.parity.oracle import gradients, hf_logits, peft_model, smollm2_folder
from tests.tiny_models import make_tiny

SFT = LossSpec(path="lorelei.algo.sft:loss", params={})
SPEC = AdapterSpec(rank=4, alpha=8)
FP32 = 1e-5  # two orders of summation in fp32
CHATS = (
    ("What is 2 + 2?", "The answer is 4."),
    ("Name a colour.", "Blue."),
    ("Say the alphabet's first letters.", "a, b, c, d"),
)


def examples_of(folder: Path, place: Path, **row: str) -> ExampleSource:
    """Chats as examples for the model of a folder."""
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in CHATS
    ]
    path = place / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer(folder)
    task = JsonlTask(kind="jsonl", path=str(path))
    stops = stop_token_ids(folder, tokenizer)
    return make_examples(task, tokenizer, 0, eval_size=0, stop_token_ids=stops, max_tokens=200)


def oracle_gradients(
    folder: Path, engine: TrainEngine, examples: list[Example], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Of the mean cross-entropy of all predicted tokens, by transformers and peft."""
    model = peft_model(folder, dtype, SPEC, engine.adapter_state("a").tensors)
    losses = []
    for example in examples:
        logits = hf_logits(model, example.tokens.tolist())[:-1]
        target = torch.from_numpy(example.tokens[1:].astype(np.int64))
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[example.predicted[1:]], target[example.predicted[1:]], reduction="none"
            )
        )
    torch.cat(losses).mean().backward()
    return gradients(model)


def test_gradients_of_examples_are_those_of_transformers_and_peft(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    source = examples_of(folder, tmp_path)
    examples = [source.example(i) for i in range(3)]
    engine = archon_engine(load_decoder(folder), max_tokens_per_mb=40)
    with adapters(engine, a=SPEC):
        expected = oracle_gradients(folder, engine, examples)
        engine.forward_backward(example_batch("a", examples), {"a": SFT})
        assert_close(look(engine, "a")["a"], expected, FP32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_on_smollm2_are_those_of_transformers_and_peft(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = smollm2_folder()
    source = examples_of(folder, tmp_path)
    examples = [source.example(i) for i in range(2)]
    engine = archon_engine(load_decoder(folder, dtype=dtype))
    with adapters(engine, a=SPEC):
        expected = oracle_gradients(folder, engine, examples, dtype)
        engine.forward_backward(example_batch("a", examples), {"a": SFT})
        found = look(engine, "a")["a"]
    if dtype == torch.float32:
        # thirty layers of roundings show in the smallest tensors alone: as one vector
        found, expected = {"all": flat(found)}, {"all": flat(expected)}
    assert_close(found, expected, FP32)


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All of them as one vector, in the order of their names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_only_the_answer_is_learnt_up_to_its_stop_token(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    tiny_tokenizer.save_pretrained(folder)
    source = examples_of(folder, tmp_path)
    texts = {
        tiny_tokenizer.decode(e.tokens[e.predicted].tolist())
        for e in (source.example(i) for i in range(3))
    }
    assert texts == {f"{answer}<|im_end|>" for _, answer in CHATS}
    whole = source.example(0)
    read = tiny_tokenizer.decode(whole.tokens[~whole.predicted].tolist())
    assert read.startswith("<|im_start|>user\n") and read.endswith("<|im_start|>assistant\n")


def test_rl_and_sft_in_one_mixed_step_are_as_alone(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "model")
    rng = np.random.default_rng(0)
    rollouts = weighted_batch("rewarded", [random_group(rng, 5, [3, 1, 6], "rewarded")])
    tokens = rng.integers(0, 300, 9).astype(np.int32)
    example = Example(id="0", tokens=tokens, predicted=np.arange(9) >= 4)
    step = AdamHyper(lr=1e-2)
    works = [
        Work(adapter="rewarded", rounds=(Round(batch=rollouts, loss=DECOUPLED, step=step),)),
        Work(
            adapter="taught",
            rounds=(Round(batch=example_batch("taught", [example]), loss=SFT, step=step),),
        ),
    ]

    def trained(*own: Work) -> dict[str, dict[str, torch.Tensor]]:
        engine = archon_engine(load_decoder(folder))
        for seed, work in enumerate(works):
            engine.add_adapter(work.adapter, SPEC)
            randomise(engine, work.adapter, seed)
        for _ in range(3):
            run_works(engine, own)
        return {w.adapter: dict(engine.adapter_state(w.adapter).tensors) for w in own}

    together = trained(*works)
    for work in works:
        assert_close(together[work.adapter], trained(work)[work.adapter], FP32)


@pytest.mark.slow
def test_sft_lowers_the_held_out_loss_of_smollm2(tmp_path: Path) -> None:
    from tests.tiny_runs import lorelei, records

    folder = smollm2_folder()
    rows = [
        {"question": f"What is {a} + {b}?", "answer": f"{a} + {b} = {a + b}, as a child knows."}
        for a in range(8)
        for b in range(8)
    ]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"model: {folder}\n"
        "steps: 6\n"
        "task: {kind: jsonl, path: sums.jsonl}\n"
        "algo: {kind: sft, batch_size: 8}\n"
        "optimizer: {lr: 1.0e-3}\n"
        "eval: {every: 3, n_prompts: 8}\n"
    )
    lorelei(tmp_path, "train", "run.yaml")
    losses = [r["scores"]["loss"] for r in records(tmp_path / "runs" / "run", "eval")]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]
    assert losses[2] < losses[0] - 0.5
