"""AReaL's example files run as they are, with a tiny model in place of the named one.

usage: python -m acceptance areal [CASE ...]
What is overridden is in AReaL's own words where it has them: the model, its data (which needs the
hub), lengths, and how many processes there are.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from acceptance.record import Line
from acceptance.table import table
from benchmarks.cases import MODEL
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.history import read_metrics
from lorelei.obs.records import StepRecord
from tests.areal.examples import example
from tests.tiny_models import make_tiny
from tests.tiny_runs import REWARD, write_rows

STEPS = 3
TIMEOUT = 280.0  # seconds
KL = 1e-4  # nats a token between trainer and sampler of one version, in fp32
SMALL = (  # in AReaL's words
    "actor.path=./model",
    "actor.dtype=float32",
    "actor.mb_spec.max_tokens_per_mb=512",
    "actor.optimizer.lr=1e-2",
    "gconfig.max_new_tokens=8",
    "gconfig.max_tokens=256",
    "train_dataset.batch_size=2",
    "train_dataset.max_length=128",
    "rollout.max_concurrent_rollouts=6",
    f"total_train_steps={STEPS}",
    "evaluator.freq_epochs=null",
    "cluster.fileroot=./runs",
)
OURS = (  # what AReaL leaves to Python code
    "task={kind: jsonl, path: rows.jsonl}",
    "reward={kind: python, path: 'rewards.py:vowels', workers: 1}",
    "threads=1",
)
PIPELINE = "actor.backend=megatron:(attn:d1p2t1c1|ffn:d1p2t1e1)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An example, the family of its model, and what this machine makes smaller."""

    engine: str  # that samples
    example: str
    family: str
    overrides: tuple[str, ...]
    steps: int = STEPS


CASES = {
    "sglang-lora": Case(
        engine="sglang",
        example="gsm8k_grpo_lora",
        family="qwen2",
        overrides=("actor.backend=fsdp:d2", "rollout.backend=sglang:d1"),
    ),
    "vllm-lora": Case(
        engine="vllm",
        example="gsm8k_grpo_lora",
        family="qwen2",
        overrides=("actor.backend=fsdp:d2", "rollout.backend=vllm:d1", "vllm.max_num_seqs=16"),
    ),
    "vllm-megatron-lora": Case(
        engine="vllm",
        example="gsm8k_grpo_megatron_lora",
        family="qwen3",
        overrides=(
            "actor.backend=megatron:d2p1t1",
            "rollout.backend=vllm:d1p1t1",
            "vllm.max_num_seqs=16",
        ),
    ),
    "vllm-megatron-lora-moe": Case(
        engine="vllm",
        example="gsm8k_grpo_megatron_lora_moe",
        family="qwen3_moe",
        overrides=(
            PIPELINE,
            "rollout.backend=vllm:d1p1t1",
            "vllm.max_num_seqs=16",
            # vLLM's CPU build leaves experts out, which the plan refuses
            "actor.target_modules=[linear_qkv, linear_proj]",
        ),
    ),
    "embedded-megatron-lora-moe": Case(
        engine="embedded",
        example="gsm8k_grpo_megatron_lora_moe",
        family="qwen3_moe",
        overrides=(
            PIPELINE,
            "rollout={kind: embedded, n_samples: 4, max_new_tokens: 8, max_head_offpolicyness: 2}",
            "publish={kind: memory}",
        ),
    ),
}


async def measure(case: Case) -> Line:
    """One row."""
    with tempfile.TemporaryDirectory() as place:
        text, steps = run(case, workplace(case.family, Path(place)))
    return row(case, text, steps)


def workplace(family: str, folder: Path) -> Path:
    """A folder with a tiny model that has a real tokenizer, problems and a reward."""
    tokenizer = load_tokenizer(resolve_model(MODEL))
    tokenizer.save_pretrained(make_tiny(family, folder / "model", vocab_size=len(tokenizer)))
    (folder / "rewards.py").write_text(REWARD)
    write_rows(folder)
    return folder


def run(case: Case, folder: Path) -> tuple[str, list[StepRecord]]:
    """`lorelei train` of the example in a workplace: what it printed, and its steps."""
    arguments = ("train", str(example(case.example)), *SMALL, *case.overrides, *OURS)
    done = subprocess.run(
        [sys.executable, "-m", "lorelei", *arguments, "runs_dir=runs", "name=run"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{case.example}: exit code {done.returncode}\n{done.stdout}")
    (steps,) = read_metrics(folder / "runs" / "run" / "metrics.jsonl").steps.values()
    return done.stdout, list(steps)


def row(case: Case, text: str, steps: list[StepRecord]) -> Line:
    """What is kept of a run, with what does not hold of it."""
    found: Line = {
        "steps": len(steps),
        "kl_sampler": steps[0].kl_sampler,  # later steps have samples of older versions
        "reward": round(steps[-1].reward, 3),
        "translated": sum("  ->  " in line for line in text.splitlines()),
        "overrides": list(case.overrides),
    }
    return {**found, "problems": problems(case, found)}


def problems(case: Case, found: Line) -> list[str]:
    """What the run should have done and did not."""
    wrong = []
    if found["steps"] != case.steps:
        wrong.append(f"{found['steps']} steps, {case.steps} were asked for")
    if not found["kl_sampler"] < KL:
        wrong.append(f"trainer and sampler are {found['kl_sampler']:.1e} nats a token apart")
    if found["translated"] < 40:
        wrong.append(f"only {found['translated']} keys are printed with what they became")
    return wrong


def _backend(overrides: Sequence[str]) -> str:
    """AReaL's words for who trains, as a cell of a table."""
    (backend,) = [o.partition("=")[2] for o in overrides if o.startswith("actor.backend=")]
    return f"`{backend}`".replace("|", "\\|")


COLUMNS = ("AReaL's example", "model", "trains", "samples", "steps", "keys printed", "KL, nats")


def section(found: Mapping[str, Line]) -> str:
    """Its part of docs/acceptance.md."""
    rows = [
        (
            CASES[name].example,
            CASES[name].family,
            _backend(line["overrides"]),
            CASES[name].engine,
            line["steps"],
            line["translated"],
            f"{line['kl_sampler']:.1e}",
        )
        for name, line in found.items()
    ]
    return f"""## AReaL's examples

`lorelei train` on AReaL's example files ([tests/areal](../tests/areal)) for {STEPS} steps, the
canary on, with a tiny random model of the same family in fp32, and as many processes as two cores
bear. vLLM's CPU build cannot serve adapters on experts: there the mixture has them on attention,
with the embedded engine on every expert. *KL* is the mean difference of the
log-probabilities of trainer and sampler in the first step, whose samples are all of the version
that is trained; later ones may be up to two versions old, and there the canary compares.

`make acceptance ARGS=areal`

{table(COLUMNS, rows)}
"""
