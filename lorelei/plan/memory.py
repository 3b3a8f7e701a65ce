"""An estimate of a run's memory, by phase and part. Arithmetic on the configuration, no torch.

On a CPU it is the resident memory of all processes of the run, on an accelerator what the run
allocates there. Completions are taken at their full length; see `PROMPT_SHARE` for prompts.

Shapes: T tokens, D hidden, F intermediate, H heads, K key/value heads, d head size, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorelei.algo.algorithm import PolicyAlgorithm
from lorelei.config.experiment import Experiment
from lorelei.config.run import RunConfig
from lorelei.inference.embedded.kind import FIRST_CAPACITY, PREFILL_TOKENS, row_capacity
from lorelei.model.config import BYTES, CHUNK_ELEMENTS, GPU_LOGITS, ModelSizes, flash_heads
from lorelei.plan.adapter_size import AdapterSize, tied_head

FP32 = 4  # bytes
MIB, GIB = 1 << 20, 1 << 30
# `python -m benchmarks.memory programs` prints these: resident memory of each kind of process of a
# run on a model of almost no size (Linux, CPU build of torch). Most of it is Python, torch,
# transformers and the tokenizer.
CONTROLLER = 450 * MIB
TRAIN_WORKER = 340 * MIB
REWARD_WORKER = {
    "reasoning_gym": 111 * MIB,
    "math_verify": 60 * MIB,
    "python": 15 * MIB,
    "env": 0,
}
# task.max_prompt_tokens is a guard against odd problems: prompts are taken to be this much of it
PROMPT_SHARE = 0.25

Parts = dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryItem:
    """An amount of memory of a process."""

    name: str
    bytes: int
    how: str  # the product that gives it, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """Processes that hold the same amounts."""

    role: str
    places: tuple[str, ...]  # of each process: a device, a URL or the CPU
    parts: tuple[MemoryItem, ...]  # of one process
    note: str = ""

    @property
    def bytes(self) -> int:
        """Of one process."""
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What the estimate is made of."""

    config: RunConfig
    model: ModelSizes
    base: int  # parameters of the base model
    stored: str  # the checkpoint's dtype
    adapters: tuple[AdapterSize, ...]
    frozen: int = 0  # parameters of references and teachers
    on_cpu: bool

    @property
    def served(self) -> bool:
        """Whether servers sample, in separate processes."""
        return self.config.rollout.kind != "embedded"

    @property
    def samplers(self) -> tuple[Experiment, ...]:
        """The adapters that are trained on rollouts."""
        return tuple(e for e in self.config.experiments() if e.samples)

    @property
    def overlaps(self) -> bool:
        """Whether memory of sampling and of training is held at once.

        An adapter that waits for its batch keeps sampling while another trains; other processes
        keep what they freed.
        """
        stale = any(e.rollout.max_head_offpolicyness for e in self.samplers)
        several = len(self.config.experiments()) > 1
        return stale or several or self.config.train.workers > 1


def estimate_memory(run: Footprint) -> dict[str, Parts]:
    """Bytes of what is held in each phase of a run, by part; the run needs the largest sum."""
    held = _programs(run) | {"base model": base_bytes(run)}
    loading = held | {"checkpoint file": run.base * BYTES[run.stored]}
    held |= _trained(run)
    rollouts = {} if run.served else _sampling(run, evaluating=False)
    beside = rollouts if run.overlaps else {}
    phases = {
        "loading": loading,
        "sampling": held | rollouts,
        "evaluating": held | ({} if run.served else _sampling(run, evaluating=True)),
        "training": held | beside | _training(run),
        "saving": held | beside | {"snapshots": snapshot_bytes(run)},
    }
    if not run.on_cpu:  # files are read and written through the CPU's memory
        del phases["loading"], phases["saving"]
    if run.served or not run.samplers:  # the servers sample, or nobody does
        del phases["sampling"], phases["evaluating"]
    elif not any(e.eval.every for e in run.samplers):
        del phases["evaluating"]
    return phases


def sampler_parts(run: Footprint) -> Parts:
    """Of an embedded engine whose trainer is in other processes."""
    base = {"base model": one_model_bytes(run), "published adapters": published_bytes(run)}
    return base | _sampling(run, evaluating=any(e.eval.every for e in run.samplers))


def _programs(run: Footprint) -> Parts:
    if not run.on_cpu:
        return {}
    workers, experiments = run.config.train.workers, run.config.experiments()
    return {
        "programs": CONTROLLER + (workers * TRAIN_WORKER if workers > 1 else 0),
        "reward workers": sum(map(reward_bytes, experiments)),
    }


def reward_bytes(e: Experiment) -> int:
    """Of an adapter's reward workers."""
    return REWARD_WORKER[e.reward.kind] * e.reward.workers if e.reward else 0


def base_bytes(run: Footprint) -> int:
    """The base model, of each train worker; an embedded sampler beside several has its own."""
    workers = run.config.train.workers
    sampler = 0 if run.served or workers == 1 else 1
    return (workers + sampler) * one_model_bytes(run)


def one_model_bytes(run: Footprint) -> int:
    """The base model as our own decoder holds it."""
    # packed for multiplication, a tied lm_head is a second matrix besides the embedding
    tied = tied_head(run.model) if _packs(run) else 0
    return (run.base + tied) * BYTES[run.config.dtype]


def _trained(run: Footprint) -> Parts:
    """What is held from the first step on."""
    workers = run.config.train.workers
    trained = sum(size.trained for size in run.adapters)
    return {
        "adapters": workers * trained * FP32,
        **({"frozen adapters": workers * run.frozen * FP32} if run.frozen else {}),
        "published adapters": published_bytes(run),
        "optimizer": workers * 2 * trained * FP32,  # Adam's two moments
    }


def published_bytes(run: Footprint) -> int:
    """Of all versions that may be sampled from; servers hold them themselves."""
    # rollouts in flight use the versions they started on
    versions = 1 + max((e.rollout.max_head_offpolicyness for e in run.samplers), default=0)
    published = sum(size.published for size in run.adapters) * FP32
    if not run.served:
        published += sum(size.serving for size in run.adapters) * BYTES[run.config.dtype]
    return versions * published


def _sampling(run: Footprint, *, evaluating: bool) -> Parts:
    if not run.samplers:
        return {}
    prompts, rows = in_flight(run, evaluating=evaluating)
    # the layers of one version, merged with its adapter
    copy = max(size.merged for size in run.adapters) * BYTES[run.config.dtype]
    return {
        "decode copy": copy,
        "KV cache": kv_cache_bytes(run, prompts, rows),
        "decoding": decoding_bytes(run, prompts, rows),
    }


def in_flight(run: Footprint, *, evaluating: bool) -> tuple[int, int]:
    """(prompts, rows) that are decoded at once."""
    experiments, limit = run.samplers, run.config.rollout.max_running
    groups = sum(e.max_concurrent for e in experiments)
    rows = sum(e.max_concurrent * e.rollout.n_samples for e in experiments)
    if evaluating:
        evaluated = max((e.eval.n_prompts for e in experiments if e.eval.every), default=0)
        if not run.overlaps:
            groups = rows = 0
        groups, rows = groups + evaluated, rows + evaluated
    rows = min(rows, limit)
    return min(groups, rows), rows


def kv_cache_bytes(run: Footprint, prompts: int, rows: int) -> int:
    """Keys and values: of each prompt once, of each row as many as its slot has room for."""
    halves = run.config.dtype != "float32"
    whole_tokens = halves and not run.on_cpu and flash_heads(run.model.head_dim)
    room = row_capacity(_new_tokens(run) - 1, whole_tokens)  # the last token is not read
    if room > FIRST_CAPACITY[whole_tokens]:
        room += room // 4  # keys grow first, then values, from what had half the room
    tokens = prompts * _prompt_tokens(run) + rows * room
    return tokens * run.model.cache_bytes(run.config.dtype)


def decoding_bytes(run: Footprint, prompts: int, rows: int) -> int:
    """The larger of the MLP in a prefill and the logits of one step, with a copy.

    The MLP holds its input and that through the norm, gate and up, and their product: 2 D + 3 F a
    token.
    """
    model = run.model
    read = min(prompts * _prompt_tokens(run), PREFILL_TOKENS)
    prefill = read * (2 * model.hidden + 3 * intermediate(model)) * BYTES[run.config.dtype]
    return max(prefill, 2 * rows * model.vocab * FP32)


def _training(run: Footprint) -> Parts:
    workers = run.config.train.workers
    return {
        "gradients": workers * sum(size.trained for size in run.adapters) * FP32,
        "activations": workers * activation_bytes(run),
    }


def activation_bytes(run: Footprint) -> int:
    """What the micro-batch of T tokens keeps for its backward pass, and its largest scratch.

    Recomputing keeps the input of every block, and all of one block at a time. Sampled positions
    keep a hidden state and its gradient (2 D). Scratch is the larger of three chunks of logits
    and the gradients in one MLP (6 F a token).
    """
    model, recompute = run.model, run.config.train.gradient_checkpointing
    T, D = micro_batch_tokens(run), model.hidden
    each, block = BYTES[run.config.dtype], T * block_elements(run)
    logits = 3 * CHUNK_ELEMENTS * (1 if run.on_cpu else GPU_LOGITS) * FP32
    mlp = T * 6 * intermediate(model) * each
    if recompute:
        return T * (model.layers + 2) * D * each + max(logits, block * each + mlp)
    return (model.layers * block + T * 2 * D) * each + max(logits, mlp)


def block_elements(run: Footprint) -> int:
    """Numbers that one block keeps for each token.

    Its input and what the MLP reads (2 D), the attention's output and its log-sum-exp (H d + H),
    rotated queries and keys and the values in one tensor (H d + 2 K d) and the values alone (K d),
    gate and up (2 F), and the adapters' x A (R a module); what norms read and the product of gate
    and up are computed again.
    """
    model = run.model
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    elements = 2 * model.hidden + 2 * queries + model.heads + 3 * keys + 2 * intermediate(model)
    elements += max(size.lifted for size in run.adapters) // model.layers
    if model.qk_norm:  # rotated apart, after norms whose inputs autograd keeps
        elements += queries + keys
    if model.moe is not None:  # every expert's copy of its input, and its output
        elements += 2 * model.moe.experts_per_token * model.hidden
    return elements


def micro_batch_tokens(run: Footprint) -> int:
    """Tokens of the largest micro-batch: no more than a worker's share of an optimizer step."""
    prompt, experiments = _prompt_tokens(run), run.config.experiments()
    step = sum(_step_tokens(e, prompt) for e in experiments) // run.config.train.sizes.data
    return min(step, max(run.config.train.max_tokens_per_mb, longest_sequence(run)))


def longest_sequence(run: Footprint) -> int:
    """Tokens of the longest prompt and answer of any adapter, as far as the model has positions."""
    longest = max(map(_longest, run.config.experiments()))
    return min(longest, run.model.context(run.config.rollout.max_context))


def _step_tokens(e: Experiment, prompt: int) -> int:
    if not isinstance(e.algo, PolicyAlgorithm):
        return e.algo.batch_size * _longest(e)
    groups = e.algo.batch_size // e.algo.ppo_n_minibatches
    return groups * (prompt + e.rollout.n_samples * e.rollout.max_new_tokens)


def _longest(e: Experiment) -> int:
    """Tokens of what is never parted; a given answer may be as long as its prompt."""
    prompt = e.task.max_prompt_tokens
    return prompt + (e.rollout.max_new_tokens if e.samples else e.algo.answers * prompt)


def snapshot_bytes(run: Footprint) -> int:
    """Copies of all adapters with their moments; of the largest, the file in memory, twice.

    safetensors hands the bytes that it wrote over to Python.
    """
    trained = [size.trained for size in run.adapters]
    return 3 * (sum(trained) + 2 * max(trained)) * FP32


def _prompt_tokens(run: Footprint) -> int:
    longest = max(e.task.max_prompt_tokens for e in run.config.experiments())
    return round(PROMPT_SHARE * longest)


def _new_tokens(run: Footprint) -> int:
    return max(max(e.rollout.max_new_tokens, e.eval.max_new_tokens or 0) for e in run.samplers)


def intermediate(model: ModelSizes) -> int:
    """Features of the MLPs that a token goes through."""
    moe = model.moe
    return model.intermediate if moe is None else moe.intermediate * moe.experts_per_token


def _packs(run: Footprint) -> bool:
    """Whether matrices are kept packed, see model.backend."""
    return run.on_cpu and run.config.dtype == "float32"
