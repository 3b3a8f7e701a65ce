"""peft with an adapter that `lorelei export` wrote, against the train engine of its run."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorelei.cli.trained_run import TrainedRun
from lorelei.launch.assemble import make_train_engine
from lorelei.model.locate import resolve_model
from lorelei.store.snapshot import read_snapshot
from tests.contract.reference_rollout import reference_logprobs
from tests.episodes import random_group, weighted_batch

TOLERANCE = 1e-5  # nats, in fp32


def exported_error(folder: Path, name: str = "default") -> float:
    """The largest difference of a log-probability, over random tokens, in nats."""
    run = TrainedRun.read(folder)
    out = folder.parent / "exported"
    command = [sys.executable, "-m", "lorelei", "export", str(folder), "--out", str(out)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    model = resolve_model(run.config.model)
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, out).eval()
    rng = np.random.default_rng(0)
    groups = [random_group(rng, 24, [16, 7], name), random_group(rng, 5, [30], name)]
    found: list[np.ndarray] = []
    for turn in (turn for group in groups for rollout in group for turn in rollout.turns):
        whole = np.concatenate([turn.prompt, turn.completion.tokens])
        logprobs = reference_logprobs(theirs, whole, 1.0)  # type: ignore[arg-type]
        found.append(logprobs[len(turn.prompt) - 1 :])
    entry = run.manifest.adapters[name]
    snapshot = read_snapshot(folder / entry.snapshot, run.manifest.files[entry.snapshot].sha256)
    with closing(make_train_engine(run.config, model, None, None)) as engine:
        engine.add_adapter(name, snapshot.state.spec)
        engine.restore(name, snapshot)
        ours = engine.logprobs(weighted_batch(name, groups), "current").logprobs
    return float(np.abs(np.concatenate(found) - ours).max())
