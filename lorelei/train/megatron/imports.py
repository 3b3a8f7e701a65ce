"""Shims for tests and development: Megatron without Transformer Engine and triton.

They put empty stand-ins into sys.modules for what Megatron-Core and Megatron-Bridge name at import
and never call here. Where the packages are installed, as on GPUs, nothing is replaced. Written for
megatron-core 0.19.2 and megatron-bridge 0.6.2.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
import typing
from collections.abc import Iterator
from unittest.mock import NonCallableMock

import torch

_STASH = "megatron.core.transformer.moe.ops.paged_stash"


def import_megatron() -> None:
    """After this, `megatron.core` and `megatron.bridge` import like any other package."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if not hasattr(typing, "override"):  # new in Python 3.12, and all that they need of it
        import typing_extensions

        setattr(typing, "override", typing_extensions.override)  # noqa: B010  (3.11 has none)
    if importlib.util.find_spec("triton") is None:
        _stand_in_for_triton_kernels()
    if importlib.util.find_spec("transformer_engine") is not None:
        return
    # the core first: it must find no Transformer Engine at all
    for name in ("models.gpt", "optimizer", "distributed"):
        importlib.import_module(f"megatron.core.{name}")
    _give_missing_classes_a_type()
    with _transformer_engine_in_name():
        importlib.import_module("megatron.bridge")


def _stand_in_for_triton_kernels() -> None:
    """The one module of kernels that the core imports whether it is used or not."""
    module = types.ModuleType(_STASH)
    module.__dict__.update(
        GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None
    )
    sys.modules[_STASH] = module


def _give_missing_classes_a_type() -> None:
    """The core leaves mocks where classes are missing, on which isinstance() fails."""
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    for name, value in list(vars(extension).items()):
        mocked = isinstance(value, NonCallableMock) and name != "te"
        if mocked or (value is None and name.endswith("GroupedLinear")):
            setattr(extension, name, type(name, (torch.nn.Module,), {}))


@contextlib.contextmanager
def _transformer_engine_in_name() -> Iterator[None]:
    """What the Bridge's modules name at import; gone again afterwards."""
    root = types.ModuleType("transformer_engine")
    pytorch, ops = (types.ModuleType(f"transformer_engine.{n}") for n in ("pytorch", "pytorch.ops"))
    for name in ("Linear", "LayerNormLinear", "TransformerLayer", "GroupedLinear"):
        setattr(pytorch, name, type(name, (), {}))
    ops.__dict__["Sequential"] = type("Sequential", (), {})
    pytorch.__dict__["ops"] = ops
    root.__dict__.update(pytorch=pytorch, __version__="0.0.0", __path__=[])
    root.__spec__ = importlib.machinery.ModuleSpec("transformer_engine", None)
    modules = {module.__name__: module for module in (root, pytorch, ops)}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
