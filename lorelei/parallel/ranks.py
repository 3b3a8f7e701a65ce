"""The ranks an engine is one of; a single process is the case of one rank."""
# pyright: reportUnknownMemberType=false
# torch.distributed declares no types

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class RankFailed(RuntimeError):
    """Another rank failed; this one gives up the call too, so that all agree."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """A torch.distributed group, or nothing when `size` is 1.

    Each `group` of neighbours hold one model together and work on the same tokens; a batch is
    shared out to groups.
    """

    rank: int = 0
    size: int = 1
    group: int = 1

    @classmethod
    def joined(cls, group: int = 1) -> Ranks:
        """The default group of this process."""
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def share(self) -> int:
        """Which share of a batch is this rank's."""
        return self.rank // self.group

    @property
    def shares(self) -> int:
        """How many a batch is cut into."""
        return self.size // self.group

    @property
    def is_leader(self) -> bool:
        """Whether this rank reports for its group, so that nothing is counted twice."""
        return self.rank % self.group == 0

    @contextmanager
    def all_or_none(self) -> Generator[None]:
        """The body succeeds on every rank, or raises on every rank."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        if self.size > 1:
            failed = torch.tensor([0 if error is None else 1])
            dist.all_reduce(failed)
            if error is None and failed.item():
                raise RankFailed("another rank failed in this call")
        if error is not None:
            raise error

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def add_up_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Sum the gradients over the ranks in one message; a rank without any counts as zero."""
        held = list(tensors)
        if self.size == 1 or not held:
            return
        flat = torch.cat(
            [(torch.zeros_like(t) if t.grad is None else t.grad).reshape(-1) for t in held]
        )
        present = torch.tensor([float(any(t.grad is not None for t in held))])
        dist.all_reduce(present)
        if not present.item():
            return
        dist.all_reduce(flat)
        for tensor, grad in zip(held, torch.split(flat, [t.numel() for t in held]), strict=True):
            tensor.grad = grad.view_as(tensor)

    def add_up_dicts(self, sums: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Sum numbers by (adapter, name) over the ranks."""
        if self.size == 1:
            return {name: dict(values) for name, values in sums.items()}
        total: dict[str, dict[str, float]] = {}
        for part in self.gather_json(sums):
            for name, values in part.items():
                into = total.setdefault(name, {})
                for key, value in values.items():
                    into[key] = into.get(key, 0.0) + value
        return total

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's value; JSON bytes, because all_gather_object unpickles what it gets."""
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]))
        longest = max(int(s) for s in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(mine, (0, longest - len(mine))))
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(text[: int(size)].numpy().tobytes()) for text, size in pairs]
