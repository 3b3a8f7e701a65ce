"""The benchmark's model and adapters as GGUF files, for llama.cpp; in the peers' environment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

Arrays = dict[str, NDArray[np.float32]]
KINDS = {"f32": gguf.GGMLQuantizationType.F32, "q8_0": gguf.GGMLQuantizationType.Q8_0}
PREFIX = "base_model.model."


class Checkpoint:
    """The base model and how llama.cpp names and arranges its tensors."""

    def __init__(self, job: dict[str, Any]) -> None:
        folder = Path(job["model"])
        self._config = json.loads((folder / "config.json").read_text())
        self._base: Arrays = load_file(folder / "model.safetensors")
        self._scale, self._alpha = job["scale"], job["alpha"]
        self._names = gguf.get_tensor_name_map(
            gguf.MODEL_ARCH.LLAMA, self._config["num_hidden_layers"]
        )

    def write_model(self, path: Path, adapter: Arrays, kind: gguf.GGMLQuantizationType) -> None:
        """W + scale * B A."""
        config = self._config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        writer.add_tokenizer_model("none")  # the benchmark speaks in token ids
        for name, base in self._base.items():
            module = PREFIX + name.removesuffix(".weight")
            merged = base
            if (a := adapter.get(f"{module}.lora_A.weight")) is not None:
                merged = base + self._scale * (adapter[f"{module}.lora_B.weight"] @ a)
            merged = self._arranged(name, merged)
            chosen = kind if merged.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(self._name(name), quantize(merged, chosen), raw_dtype=chosen)
        _write(writer)

    def write_adapter(self, path: Path, adapter: Arrays) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", self._alpha)
        for name, tensor in adapter.items():
            module, _, which = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
            if which == "lora_B":
                tensor = self._arranged(f"{module}.weight", tensor)
            writer.add_tensor(f"{self._name(f'{module}.weight')}.{which.lower()}", tensor)
        _write(writer)

    def _name(self, name: str) -> str:
        return self._names.get_name(name, try_suffixes=(".weight",))

    def _arranged(self, name: str, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """llama.cpp rotates neighbours where transformers rotates halves of a head."""
        for module, field in (("q_proj", "attention"), ("k_proj", "key_value")):
            if name.endswith(f"{module}.weight"):
                heads = self._config[f"num_{field}_heads"]
                halves = weight.reshape(heads, 2, -1, weight.shape[1])
                return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        return weight


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
