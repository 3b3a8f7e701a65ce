"""Makes ./model: a random Llama of 300 tokens with a byte-level tokenizer and a ChatML template.

usage: python mk_tiny.py [FOLDER]
As a module: see `make`.
"""

from __future__ import annotations

import sys
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(
    folder="model",
    template=CHATML,
    special=(),
    plain=(),
    config=None,
    family="llama",
    eos="<|im_end|>",
    pad="<|endoftext|>",
    bos=None,
    post=None,
    seed=0,
):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen3Config,
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        ["What is the sum of 12 and 30? The answer is 42."],
        trainers.BpeTrainer(
            vocab_size=290,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if plain:
        t.add_tokens(list(plain))
    if post is not None:
        t.post_processor = post
    names = {"eos_token": eos, "pad_token": pad}
    if bos:
        names["bos_token"] = bos
    tok = PreTrainedTokenizerFast(tokenizer_object=t, chat_template=template, **names)
    tok.save_pretrained(folder)
    sizes = dict(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=None,
    )
    sizes.update(config or {})
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    if family == "qwen2":
        sizes.pop("head_dim", None)
    torch.manual_seed(seed)
    m = AutoModelForCausalLM.from_config(kind(**sizes), dtype=torch.float32)
    with torch.no_grad():
        for n, p in m.named_parameters():
            if "norm" not in n:
                p.normal_(0, (2 if "embed" in n or "head" in n else 1) * p.shape[-1] ** -0.5)
    m.tie_weights()
    m.save_pretrained(folder)
    return tok


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else "model")
