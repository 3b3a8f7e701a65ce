"""Generation with one adapter of SmolLM2-135M, fp32: Lorelei beside transformers and llama.cpp.

usage: python -m benchmarks.generation [CASE ...]
Every side runs in a fresh process and they take turns. A round publishes a new adapter version
(read, merged or written out, as the side needs it) and then samples. Each peer is tried at its
settings first and measured at the fastest. Writes benchmarks/results/generation.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import ALPHA, MODEL, RANK, StepCase
from benchmarks.peers.environment import peers_python
from benchmarks.turns import Line, begun, keep, run
from lorelei.lora.peft_folder import write_peft_folder
from lorelei.lora.state import AdapterState, tensor_names
from lorelei.lora.targets import match_targets, module_shapes
from lorelei.model.load import read_config
from lorelei.model.locate import resolve_model
from lorelei.model.tokenizer import load_tokenizer
from lorelei.types import AdapterSpec

TURNS, ROUNDS = 2, 2
TRIED_TOKENS = 24  # of a sequence, when a peer's settings are tried
GREEDY_TOKENS = 16
CASES = {
    case.name: case
    for case in (
        StepCase(name="4x8", prompts=4, filler=2),
        StepCase(name="8", prompts=8, samples=1, filler=2),
        StepCase(name="1", prompts=1, samples=1, filler=2),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A program and the arguments that it is tried with."""

    program: str
    ways: tuple[tuple[str, ...], ...]
    same_precision: bool = True


PEERS = {
    "transformers + peft": Peer(
        program="transformers_generate", ways=(("unmerged", "dynamic"), ("unmerged", "static"))
    ),
    "transformers, merged": Peer(
        program="transformers_generate", ways=(("merged", "dynamic"), ("merged", "static"))
    ),
    "transformers, continuous batching": Peer(
        program="transformers_generate", ways=(("merged", "paged"),)
    ),
    "llama.cpp, merged": Peer(program="llama_cpp_generate", ways=(("f32",),)),
    "llama.cpp + LoRA": Peer(program="llama_cpp_generate", ways=(("lora",),)),
    "llama.cpp, Q8_0": Peer(program="llama_cpp_generate", ways=(("q8_0",),), same_precision=False),
}
WAITING = ("active", "passive")
Setting = tuple[tuple[str, ...], str]  # one of a peer's ways, how its idle threads wait


def write_job(folder: Path, case: StepCase, rounds: int) -> Path:
    """What every side reads: token ids, and an adapter for the warm-up and for each round."""
    model = resolve_model(MODEL)
    tokenizer = load_tokenizer(model)
    adapters = [folder / f"adapter-{version}" for version in range(rounds + 1)]
    for version, path in enumerate(adapters):
        write_peft_folder(path, _adapter(version), MODEL)
    spec = AdapterSpec(rank=RANK, alpha=ALPHA)
    job = {
        "model": str(model),
        "prompts": [
            tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"]
            for m in case.messages(0)
        ],
        "samples": case.samples,
        "new_tokens": case.new_tokens,
        "greedy_tokens": GREEDY_TOKENS,
        "adapters": [str(path) for path in adapters],
        "alpha": spec.alpha,
        "scale": spec.scale,
    }
    folder.mkdir(exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def _adapter(version: int) -> AdapterState:
    """As after a training: every B is far from zero, and greedy answers are not the base's."""
    hf_config = read_config(resolve_model(MODEL))
    spec = AdapterSpec(rank=RANK, alpha=ALPHA)
    shapes = module_shapes(hf_config)
    generator = torch.Generator().manual_seed(version)
    tensors: dict[str, torch.Tensor] = {}
    for module in match_targets(shapes, spec, MODEL):
        (out, inputs), (name_a, name_b) = shapes[module], tensor_names(module)
        bound = inputs**-0.5
        tensors[name_a] = torch.empty(RANK, inputs).uniform_(-bound, bound, generator=generator)
        tensors[name_b] = torch.empty(out, RANK).normal_(0, 0.02, generator=generator)
    return AdapterState(spec=spec, tensors=dict(sorted(tensors.items())))


def ours(job: Path, case: StepCase) -> list[Line]:
    command = [sys.executable, "-m", "benchmarks.ours_generate", str(job)]
    # one malloc arena, as the command line sets it
    return checked("lorelei", run(command, MALLOC_ARENA_MAX="1"), case)


def theirs(peer: Peer, job: Path, case: StepCase, setting: Setting) -> list[Line]:
    way, waiting = setting
    command = [str(peers_python()), "-m", f"benchmarks.peers.{peer.program}", str(job), *way]
    return checked(" ".join(way), run(command, OMP_WAIT_POLICY=waiting), case)


def checked(side: str, lines: list[Line], case: StepCase) -> list[Line]:
    """The greedy answers and the rounds, all of full length."""
    expected = case.prompts * case.samples * case.new_tokens
    for line in lines[1:]:
        if line["generated"] != expected:
            raise RuntimeError(f"{side}: {line['generated']} tokens in a round, not {expected}")
    return lines


def fastest(peer: Peer, job: Path, case: StepCase) -> tuple[Setting, dict[str, float]]:
    """The peer's best setting, and the seconds of a round with each that was tried."""
    tried: dict[Setting, float] = {}

    def best(settings: list[Setting]) -> Setting:
        for setting in settings:
            if setting not in tried:
                tried[setting] = _seconds(theirs(peer, job, case, setting)[-1])
        return min(settings, key=lambda setting: tried[setting])

    way, _ = best([(way, WAITING[0]) for way in peer.ways])
    setting = best([(way, waiting) for waiting in WAITING])
    return setting, {_words(one): round(seconds, 2) for one, seconds in tried.items()}


def _words(setting: Setting) -> str:
    way, waiting = setting
    return f"{' '.join(way)}, OMP_WAIT_POLICY={waiting}"


def _seconds(line: Line) -> float:
    return line["publish"][0] + line["generate"][0]


def summary(lines: list[Line]) -> dict[str, Any]:
    """Medians and spread of the rounds; publishing and generating together unless named."""
    walls = [_seconds(line) for line in lines]
    tokens = lines[0]["generated"]
    return {
        "rounds": len(lines),
        "seconds": round(median(walls), 3),
        "seconds_range": [round(min(walls), 3), round(max(walls), 3)],
        "publish_s": round(median(line["publish"][0] for line in lines), 3),
        "generate_s": round(median(line["generate"][0] for line in lines), 3),
        "cpu_s": round(median(line["publish"][1] + line["generate"][1] for line in lines), 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / median(walls), 1),
        "peak_gib": max(line["peak_gib"] for line in lines),
    }


def agreement(rows: list[list[int]], reference: list[list[int]]) -> float:
    """The share of greedy tokens that are the same."""
    pairs = [pair for both in zip(rows, reference, strict=True) for pair in zip(*both, strict=True)]
    return round(sum(a == b for a, b in pairs) / len(pairs), 3)


def measure(case: StepCase, folder: Path) -> dict[str, Any]:
    """Choose each peer's setting, then take turns."""
    short = replace(case, new_tokens=TRIED_TOKENS)
    trial = write_job(folder / "trial", short, rounds=1)
    job = write_job(folder / "turns", case, ROUNDS)
    settings = {name: fastest(peer, trial, short) for name, peer in PEERS.items()}
    lines: dict[str, list[Line]] = {name: [] for name in ("lorelei", *PEERS)}
    same: dict[str, float] = {}
    for _ in range(TURNS):
        greedy, *rounds = ours(job, case)
        lines["lorelei"] += rounds
        for name, peer in PEERS.items():
            their_greedy, *rounds = theirs(peer, job, case, settings[name][0])
            lines[name] += rounds
            same[name] = agreement(their_greedy["greedy"], greedy["greedy"])
            # rounding may decide a near tie otherwise; other weights agree in few places
            if peer.same_precision and same[name] < 0.7:
                raise RuntimeError(f"{name}: only {same[name]:.0%} of its greedy tokens are ours")
    results = {name: summary(found) for name, found in lines.items()}
    mine = results["lorelei"]["seconds"]
    for name, peer in PEERS.items():
        setting, tried = settings[name]
        results[name] |= {
            "setting": _words(setting),
            "tried_s": tried,
            "same_precision": peer.same_precision,
            "greedy_agreement": same[name],
            "times_slower": round(results[name]["seconds"] / mine, 2),
            "times_slower_generating": round(results[name]["generate_s"] / mine, 2),
        }
    lengths = [len(tokens) for tokens in json.loads((job / "job.json").read_text())["prompts"]]
    return {
        "prompts": case.prompts,
        "samples": case.samples,
        "prompt_tokens": round(sum(lengths) / len(lengths)),
        "new_tokens": case.new_tokens,
        "sides": results,
    }


def section(record: dict[str, Any]) -> str:
    """Its part of docs/benchmarks.md."""
    lines = [
        "## Generation",
        "",
        "SmolLM2-135M with one adapter on all linear layers, sampling at temperature 1, every "
        "sequence of full length. A training step publishes a new "
        "adapter version before it generates, so every round does: its seconds include merging, "
        "or writing and loading a GGUF file (Lorelei merges inside what is listed as "
        "generating), and reading the prompts. Each side runs in fresh processes, in turns, each "
        "peer with the faster of its caches and of `OMP_WAIT_POLICY` active and passive. All "
        "weights are fp32 but in the last row; llama.cpp keeps keys and values in fp16, its "
        "default and faster. The greedy answers of all fp32 sides are compared first.",
        "",
        "Command: `python -m benchmarks.generation`",
    ]
    for case in record["cases"].values():
        lines += [
            "",
            f"{case['prompts']} x {case['samples']} sequences (prompts x samples), "
            f"{case['prompt_tokens']} prompt tokens, {case['new_tokens']} sampled ones:",
            "",
            "| side | seconds (range) | publishing | generating | tokens/s | CPU seconds | GiB "
            "| time / Lorelei's | its generating / Lorelei's time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for side, found in case["sides"].items():
            low, high = found["seconds_range"]
            cells = [side, f"{found['seconds']:.2f} ({low:.2f}-{high:.2f})"]
            cells += [f"{found[key]:.2f}" for key in ("publish_s", "generate_s")]
            cells += [f"{found[key]:.1f}" for key in ("tokens_per_s", "cpu_s", "peak_gib")]
            cells += [
                str(found.get(key, "")) for key in ("times_slower", "times_slower_generating")
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    results: dict[str, Any] = begun("generation", sys.argv[1:])
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(CASES[name], Path(folder))
        sys.stdout.write(json.dumps({name: results[name]}, indent=2) + "\n")
        sys.stdout.flush()
        keep("generation", {"cases": results})


if __name__ == "__main__":
    main()
