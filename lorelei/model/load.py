"""Builds a Decoder from a checkpoint: safetensors (sharded too), or GGUF through transformers."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorelei.model.config import DecoderConfig, MoeConfig
from lorelei.model.decoder import Decoder, Layer
from lorelei.model.kernels.build import rest
from lorelei.model.linear import FrozenLinear
from lorelei.model.mlp import Mlp, Moe
from lorelei.model.norm import RmsNorm
from lorelei.model.rope import RotaryTable


class CheckpointError(ValueError):
    """The model folder is incomplete or damaged."""


class Checkpoint:
    """The tensors of a checkpoint by name, converted to one dtype and device when asked for."""

    def __init__(
        self, tensors: Mapping[str, Any], folder: Path, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors, self._folder = tensors, folder
        self._dtype, self._device = dtype, device

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Raises CheckpointError when it is missing or of another shape."""
        if name not in self._tensors:
            raise CheckpointError(f"model: {self._folder} has no tensor {name!r}; is it complete?")
        held = self._tensors[name]
        tensor = held if isinstance(held, Tensor) else held.get_tensor(name)
        if tensor.shape != shape:
            raise CheckpointError(
                f"model: tensor {name!r} of {self._folder} has shape {list(tensor.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        return tensor.to(self._device, self._dtype, copy=True)

    def linear(self, name: str, out: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        """Weight [out, inputs] and, where there is one, bias of a linear module."""
        bias = self.tensor(f"{name}.bias", out) if f"{name}.bias" in self else None
        return self.tensor(f"{name}.weight", out, inputs), bias

    def fused(self, prefix: str, outs: Mapping[str, int], inputs: int) -> FrozenLinear:
        """One layer of the linear modules `prefix.name` {name: outputs} that share an input."""
        names = {f"{prefix}.{name}": out for name, out in outs.items()}
        return FrozenLinear.fuse({n: self.linear(n, out, inputs) for n, out in names.items()})


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json (or what transformers reads from a GGUF file's header)."""
    path = folder / "config.json"
    if not path.exists() and (gguf := sorted(folder.glob("*.gguf"))):
        configs: Any = import_module("transformers").AutoConfig  # its methods have no types
        with _one_line_errors(gguf[0]):
            return configs.from_pretrained(folder, gguf_file=gguf[0].name).to_dict()
    if not path.exists():
        raise CheckpointError(f"model: {folder} has neither config.json nor a .gguf file")
    return _read_json(path)


def load_decoder(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Decoder:
    """Read a checkpoint folder. Raises UnsupportedModel or CheckpointError with one clear line."""
    config = DecoderConfig.from_hf(read_config(folder))
    with ExitStack() as files:
        tensors = _open(folder, files)
        checkpoint = Checkpoint(tensors, folder, dtype, device or torch.device("cpu"))
        decoder = build_decoder(config, checkpoint)
    rest()
    return decoder


def _open(folder: Path, files: ExitStack) -> dict[str, Any]:
    """{tensor name: open safetensors file, or tensor}."""
    found = shards(folder)
    if not found:
        if gguf := sorted(folder.glob("*.gguf")):
            return _read_gguf(folder, gguf[0].name)
        raise CheckpointError(f"model: {folder} has no .safetensors or .gguf file")
    return open_tensors(found, files)


def open_tensors(paths: Iterable[Path], files: ExitStack) -> dict[str, Any]:
    """{tensor name: open safetensors file}. Raises CheckpointError for a file that is none."""
    tensors: dict[str, Any] = {}
    for path in paths:
        try:
            file: Any = files.enter_context(cast(Any, safe_open)(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"model: {path} is not a readable safetensors file: {error}"
            ) from None
        tensors.update(dict.fromkeys(file.keys(), file))
    return tensors


def shards(folder: Path) -> list[Path]:
    """The files that the index names, or every safetensors file when there is no index."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return sorted(folder.glob("*.safetensors"))
    found = sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    if missing := [shard.name for shard in found if not shard.exists()]:
        raise CheckpointError(f"model: {folder} lacks {', '.join(missing)}")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not text
        raise CheckpointError(f"model: {path} is not JSON: {error}") from None


def _read_gguf(folder: Path, name: str) -> dict[str, Any]:
    models: Any = import_module("transformers").AutoModelForCausalLM  # its methods have no types
    with _one_line_errors(folder / name):
        model = models.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return dict(_unstacked(model.state_dict()))


@contextmanager
def _one_line_errors(path: Path) -> Generator[None]:
    try:
        yield
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"model: transformers cannot read {path}: {reason}") from error


def _unstacked(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """transformers 5 holds a layer's experts as one tensor [E, O, D]; checkpoints name each."""
    for name, tensor in tensors.items():
        prefix, _, module = name.rpartition(".")
        if module == "gate_up_proj":
            for e, (gate, up) in enumerate(both.chunk(2) for both in tensor):
                yield f"{prefix}.{e}.gate_proj.weight", gate
                yield f"{prefix}.{e}.up_proj.weight", up
        elif module == "down_proj":
            for e, down in enumerate(tensor):
                yield f"{prefix}.{e}.down_proj.weight", down
        else:
            yield name, tensor


def build_decoder(config: DecoderConfig, checkpoint: Checkpoint) -> Decoder:
    """Fuse the projections that share an input and pack every matrix."""
    embedding = checkpoint.tensor("model.embed_tokens.weight", config.vocab, config.hidden)
    # a checkpoint with a separate head is not tied, whatever its config says, as in transformers
    tied = config.tied_embeddings and "lm_head.weight" not in checkpoint
    own = None if tied else checkpoint.linear("lm_head", config.vocab, config.hidden)
    return Decoder(
        config=config,
        embedding=embedding,
        layers=tuple(_layer(config, checkpoint, i) for i in range(config.layers)),
        norm=RmsNorm(checkpoint.tensor("model.norm.weight", config.hidden), config.norm_eps),
        head=FrozenLinear.fuse({"lm_head": own or (embedding, None)}),
        tied=tied,
        rotary=RotaryTable(config, embedding.dtype, embedding.device),
    )


def _layer(config: DecoderConfig, checkpoint: Checkpoint, number: int) -> Layer:
    prefix = f"model.layers.{number}"
    attention = f"{prefix}.self_attn"
    hidden, d = config.hidden, config.head_dim
    q, kv = config.heads * d, config.kv_heads * d

    def norm(name: str, size: int) -> RmsNorm:
        return RmsNorm(checkpoint.tensor(f"{name}.weight", size), config.norm_eps)

    return Layer(
        input_norm=norm(f"{prefix}.input_layernorm", hidden),
        qkv=checkpoint.fused(attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden),
        q_norm=norm(f"{attention}.q_norm", d) if config.qk_norm else None,
        k_norm=norm(f"{attention}.k_norm", d) if config.qk_norm else None,
        out=checkpoint.fused(attention, {"o_proj": hidden}, q),
        mlp_norm=norm(f"{prefix}.post_attention_layernorm", hidden),
        mlp=_moe(checkpoint, f"{prefix}.mlp", hidden, config.moe)
        if config.moe is not None and config.moe.is_sparse(number)
        else _mlp(checkpoint, f"{prefix}.mlp", hidden, config.intermediate),
    )


def _mlp(checkpoint: Checkpoint, prefix: str, hidden: int, intermediate: int) -> Mlp:
    widths = {"gate_proj": intermediate, "up_proj": intermediate}
    return Mlp(
        gate_up=checkpoint.fused(prefix, widths, hidden),
        down=checkpoint.fused(prefix, {"down_proj": hidden}, intermediate),
    )


def _moe(checkpoint: Checkpoint, prefix: str, hidden: int, moe: MoeConfig) -> Moe:
    return Moe(
        router=checkpoint.tensor(f"{prefix}.gate.weight", moe.experts, hidden),
        experts=tuple(
            _mlp(checkpoint, f"{prefix}.experts.{e}", hidden, moe.intermediate)
            for e in range(moe.experts)
        ),
        per_token=moe.experts_per_token,
        normalise=moe.normalise_topk,
    )
