"""An estimate of a run's memory, by part. Arithmetic on the configuration; nothing is loaded."""

from __future__ import annotations

from lorelei.config.run import RunConfig
from lorelei.model.config import DecoderConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FP32 = 4
LOGITS_CHUNK = 1 << 23  # elements, see model.head


def estimate_memory(
    config: RunConfig, model: DecoderConfig, *, base: int, linear: int, trained: int
) -> dict[str, int]:
    """Bytes of each part at its largest.

    base, linear, trained: numbers of parameters of the base model, of its linear layers with
    lm_head, and of all adapters together.
    """
    bytes_each, workers = BYTES[config.dtype], config.train.workers
    # a tied lm_head is multiplied in a layout of its own, besides the embedding
    tied = model.vocab * model.hidden if model.tied_embeddings else 0
    copies, turned = base + tied, linear - tied
    return {
        "base model": workers * copies * bytes_each,
        # a CPU keeps fp32 matrices a second time, laid out for the backward pass; a tied head
        # uses the embedding
        "backward copy": workers * turned * bytes_each if config.dtype == "float32" else 0,
        # the linear layers of one version, packed or merged for fast decoding
        "decode copy": linear * bytes_each,
        # trained, and published
        "adapters": (workers + 1) * trained * _FP32,
        # a gradient and Adam's two moments
        "optimizer": workers * 3 * trained * _FP32,
        "activations": workers * activation_bytes(config, model),
        "KV cache": kv_cache_bytes(config, model),
    }


def activation_bytes(config: RunConfig, model: DecoderConfig) -> int:
    """What one micro-batch of T = train.max_tokens_per_mb tokens keeps for its backward pass.

    A block keeps its input and what the MLP reads (2 D a token), rotated queries and the
    attention's output (2 H d), rotated keys and values (2 K d), gate and up (2 F); norms and the
    product of gate and up are computed again. Recomputing keeps the input of every block (D), and
    all of one block at a time. Sampled positions keep a hidden state and its gradient (2 D);
    logits come in chunks of a fixed size, of which three are alive at once.
    """
    T, D = config.train.max_tokens_per_mb, model.hidden
    intermediate = model.intermediate
    if model.moe is not None:
        intermediate = model.moe.intermediate * model.moe.experts_per_token
    block = 2 * D + 2 * (model.heads + model.kv_heads) * model.head_dim + 2 * intermediate
    layers = model.layers
    kept = layers * D + block if config.train.gradient_checkpointing else layers * block
    return T * (kept + 2 * D) * BYTES[config.dtype] + 3 * LOGITS_CHUNK * _FP32


def kv_cache_bytes(config: RunConfig, model: DecoderConfig) -> int:
    """Keys and values of as many sequences as may be decoded at once, each as long as it may be."""
    experiments = config.experiments()
    rollouts = sum(e.max_concurrent * e.rollout.n_samples for e in experiments)
    evaluated = max((e.eval.n_prompts for e in experiments if e.eval.every), default=0)
    sequences = min(config.rollout.max_running, max(rollouts, evaluated))
    per_token = model.layers * 2 * model.kv_heads * model.head_dim * BYTES[config.dtype]
    return sequences * longest_sequence(config, model) * per_token


def longest_sequence(config: RunConfig, model: DecoderConfig) -> int:
    """Tokens of the longest prompt and completion that the run allows."""
    longest = max(
        e.task.max_prompt_tokens + max(e.rollout.max_new_tokens, e.eval.max_new_tokens or 0)
        for e in config.experiments()
    )
    return min(longest, config.rollout.max_context or model.max_positions)
