"""Shims that let SGLang run on a CPU, for tests and small runs.

SGLang's wheels are built for CUDA: its imports and its LoRA code expect torchvision's and
sgl_kernel's operators and pinned memory. The launcher loads these replacements before it imports
SGLang, in every process of the server, and only where torch finds no accelerator; a server on a GPU
runs none of this.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch

from lorelei.process import give_large_blocks_back


def install_shims() -> None:
    """Install all shims. Does nothing where there is an accelerator."""
    if torch.accelerator.is_available():
        return
    give_large_blocks_back()
    _declare_torchvision_operators()
    _stand_in_for_sgl_kernel()
    _ignore_pinned_memory()


def _declare_torchvision_operators() -> None:
    """torchvision's wheel is a CUDA build; its Python part needs the schemas of two operators."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declare_torchvision_operators.library = library  # type: ignore[attr-defined]  # kept alive


class _SglKernel(types.ModuleType):
    """Names that SGLang imports for its CPU build and does not call on this path."""

    def __getattr__(self, name: str) -> Any:
        if not name.endswith("_cpu"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"sgl_kernel.{name}: not installed on this machine")

        return missing


def _stand_in_for_sgl_kernel() -> None:
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    module = _SglKernel("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    module.__path__ = []
    sys.modules["sgl_kernel"] = module


def _ignore_pinned_memory() -> None:
    """SGLang's LoRA code pins host memory without asking for an accelerator."""
    from torch.utils import _device

    # fills torch's cached set of constructors with the originals: with ours inside,
    # `with torch.device(...)` makes silently wrong models
    _device._device_constructors()

    def unpinned(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    for name in ("tensor", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
