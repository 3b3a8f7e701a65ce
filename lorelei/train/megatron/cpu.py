"""Shims for tests and development: Megatron-Core, which is written for CUDA, on a CPU.

They replace functions of torch.cuda and of the core for the whole process. Where CUDA is there
they do nothing, and no training on GPUs goes through any of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device
from torch import Tensor

_CPU = torch.device("cpu")
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")


def run_on_cpu() -> None:
    """Shim: let the core build and run models without CUDA. Before `megatron.core` is imported."""
    if torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, _nothing())
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.manual_seed = _seed
    cuda.Stream, cuda.Event = (type(n, (_Stream,), {}) for n in ("Stream", "Event"))
    one = _Stream()
    cuda.current_stream = lambda *_: one
    cuda.stream = lambda *_: contextlib.nullcontext()
    _map_factories()
    tensor: Any = Tensor
    tensor.cuda = lambda self, *_, **__: self
    module: Any = torch.nn.Module
    module.cuda = lambda self, *_, **__: self


def run_core_on_cpu() -> None:
    """Shim: the same inside the core, once it is imported."""
    if torch.cuda.is_available():
        return
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # the splits of an all-to-all stay tensors unless they come from a GPU
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = _splits


def _map_factories() -> None:
    # torch keeps the originals at the first call; without it `with torch.device(...)` no longer
    # reaches them, and models get other numbers without an error
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def made(*args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is not None:
            options["device"] = _CPU if str(device).startswith("cuda") else device
        return factory(*args, **options)

    return made


def _nothing() -> Callable[..., None]:
    """A new function each time: torch refuses one under two names."""
    return lambda *_, **__: None


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


def _splits(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _Stream:
        return self

    def wait_stream(self, *_: Any) -> None:
        pass

    wait_event = synchronize = record = wait_stream
