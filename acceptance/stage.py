"""A train engine and a rollout engine on one base model, as a run builds them, and its publishers.

All cases of one engine and size share a stage: a server takes longer to start than most to measure.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import MODEL
from lorelei.inference.contract import InferenceEngine
from lorelei.inference.kinds import INFERENCE
from lorelei.inference.server.engine import ServerEngine
from lorelei.launch.assemble import build, make_loop, make_thread
from lorelei.lora.state import AdapterSnapshot, AdapterState
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.obs.console import Console
from lorelei.publish.publisher import VersionPublisher
from lorelei.run_file import to_plain, validate
from lorelei.store.run import RunStore
from lorelei.train.contract import TrainEngine
from lorelei.types import AdapterRef
from tests.tiny_models import make_tiny

NAME = "default"  # of the adapter
ROOM = 11  # versions that a server has room for
REWARD = "def zero(completion, **row):\n    return 0.0\n"
PUBLISHERS = {name: kind.publishers for name, kind in INFERENCE.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A base model and its adapter."""

    rank: int
    spread: float  # standard deviation of B, so that every version answers differently
    tolerance: float  # of log-probabilities in fp32
    answer: int  # tokens of a request that keeps a server busy, on average
    tensor_parallel: int = 1  # processes that a server splits the model over


SIZES = {
    "tiny": Size(rank=8, spread=0.05, tolerance=1e-5, answer=96),
    # sums of two halves are rounded once more
    "tiny-tp2": Size(rank=8, spread=0.05, tolerance=2e-5, answer=96, tensor_parallel=2),
    "smollm2": Size(rank=16, spread=0.02, tolerance=3e-4, answer=48),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is put on the stage."""

    engine: str
    publisher: str
    size: str

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.publisher}-{self.size}"


def holds(engine: str, size: str) -> bool:
    """Whether there is such a stage: only servers split a model."""
    return engine != "embedded" or SIZES[size].tensor_parallel == 1


def cases(*sizes: str) -> dict[str, Case]:
    """Every rollout engine by every publisher that reaches it, for models of these sizes."""
    found = [
        Case(engine=engine, publisher=publisher, size=size)
        for engine, publishers in PUBLISHERS.items()
        for size in sizes
        if holds(engine, size)
        for publisher in publishers
    ]
    return {case.name: case for case in found}


@dataclass(slots=True, kw_only=True)
class Stage:
    """The engines, and the files they may write."""

    size: Size
    model: Path
    folder: Path  # of the run
    trainer: TrainEngine
    rollout: InferenceEngine
    make_publisher: Callable[[str], VersionPublisher]  # by its kind
    publisher: VersionPublisher
    version: int = 0  # the last one published

    @asynccontextmanager
    async def through(self, publisher: str) -> AsyncIterator[Stage]:
        """Publish in this way, until the end of the block."""
        self.publisher = self.make_publisher(publisher)
        try:
            yield self
        finally:
            await self.publisher.close()

    @property
    def servers(self) -> tuple[int, ...]:
        """The processes of the rollout servers; this one where there are none."""
        if not isinstance(self.rollout, ServerEngine):
            return (os.getpid(),)
        processes = [replica.process for replica in self.rollout.replicas]
        return tuple(pid for process in processes if process for pid in process.pids)

    def state(self, version: int) -> AdapterState:
        """The adapter that `change` makes: other tensors for every version."""
        mine = self.trainer.adapter_state(NAME)
        generator = torch.Generator().manual_seed(version)
        tensors = {
            name: torch.randn(old.shape, generator=generator) * self.size.spread
            if "lora_B" in name
            else old
            for name, old in mine.tensors.items()
        }
        return AdapterState(spec=mine.spec, tensors=tensors)

    def change(self) -> None:
        """Give the trainer the tensors of the version after the last one."""
        state = self.state(self.version + 1)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.tensors.items()}
        snapshot = AdapterSnapshot(state=state, exp_avg=zeros, exp_avg_sq=zeros, step=0)
        self.trainer.restore(NAME, snapshot)

    async def publish(self) -> AdapterRef:
        """Publish what the trainer has as the next version."""
        self.version += 1
        states = {NAME: self.trainer.adapter_state(NAME)}
        return (await self.publisher.publish({NAME: self.version}, states))[NAME]


@asynccontextmanager
async def staged(engine: str, size: str) -> AsyncIterator[Stage]:
    """Start everything, and stop it at the end."""
    with tempfile.TemporaryDirectory() as place:
        async with AsyncExitStack() as stack:
            root = Path(place)
            model = _model(size, root)
            plain = _config(engine, size, model, root)
            config = validate(plain)
            parts = await build(config, stack)
            thread = make_thread(config, parts, stack, None)
            folder = root / "runs" / config.name
            store = RunStore.create(folder, to_plain(config), keep=config.checkpoint.keep)
            stack.callback(store.close)

            def make_publisher(kind: str) -> VersionPublisher:
                through = validate({**plain, "publish": {"kind": kind}})
                return make_loop(through, parts, thread, store, Console({NAME: 1})).publisher

            yield Stage(
                size=SIZES[size],
                model=model,
                folder=folder,
                trainer=thread.engine,
                rollout=parts.sampler.engine,
                make_publisher=make_publisher,
                publisher=make_publisher(PUBLISHERS[engine][-1]),
            )


def _model(size: str, root: Path) -> Path:
    real = resolve_model(MODEL)
    if size == "smollm2":
        return real
    # see inference.sglang.kind.PADDING
    wide = {"intermediate_size": 128} if SIZES[size].tensor_parallel > 1 else {}
    return tiny_with_tokenizer(root / "model", **wide)


def tiny_with_tokenizer(folder: Path, **overrides: Any) -> Path:
    """A tiny model in this folder, with the real one's tokenizer."""
    tokenizer = load_tokenizer(resolve_model(MODEL))
    make_tiny("llama", folder, vocab_size=len(tokenizer), **overrides)
    tokenizer.save_pretrained(folder)
    return folder


def _config(engine: str, size: str, model: Path, root: Path) -> dict[str, Any]:
    (root / "rows.jsonl").write_text(json.dumps({"question": "?", "answer": "1"}) + "\n")
    (root / "reward.py").write_text(REWARD)
    rank, parallel = SIZES[size].rank, SIZES[size].tensor_parallel
    return {
        "name": "acceptance",
        "model": str(model),
        "runs_dir": str(root / "runs"),
        "threads": 1,
        "lora": {"lora_rank": rank, "lora_alpha": 2 * rank},
        "rollout": {
            "kind": engine,
            "max_running": 16,
            "max_context": 512,
            "max_head_offpolicyness": ROOM - 2,  # see inference.server.options.versions_in_use
            **({"tensor_parallel_size": parallel} if parallel > 1 else {}),
        },
        "task": {"kind": "jsonl", "path": str(root / "rows.jsonl")},
        "reward": {"kind": "python", "path": f"{root / 'reward.py'}:zero", "workers": 1},
        "eval": {"every": 0},
    }
