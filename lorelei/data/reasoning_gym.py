"""reasoning-gym's procedural datasets, one or a weighted mixture, as a PromptSource."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import DATASETS, create_dataset

from lorelei.config.errors import nearest, shown
from lorelei.config.task import MixtureItem
from lorelei.data.contract import item_at
from lorelei.data.renderer import Renderer, question_key
from lorelei.data.rows import first_held_out
from lorelei.types import Prompt

# reasoning-gym draws item i with the generator Random(seed + i), so that neighbouring seeds share
# items. Training seeds lie below 2**30 and the held-out seed far above, within numpy's 32 bits.
EVAL_SEED = 2**31


class ReasoningGymSource:
    """`size` training items per epoch; a mixture draws the dataset of each item by weight."""

    notes: Sequence[str] = ()

    def __init__(
        self,
        mixture: Sequence[MixtureItem],
        *,
        size: int,
        eval_size: int,
        renderer: Renderer,
        seed: int,
    ) -> None:
        """Raises ValueError for an unknown dataset, a bad config, or nothing left to train on."""
        self._size = size
        self._renderer = renderer
        self._order_seed = seed
        base = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8]) % 2**30
        self._train = _Mixture(mixture, seed=base, size=self._size)
        held_out = _Mixture(mixture, seed=EVAL_SEED, size=max(eval_size, 1))
        self._held_out: list[Prompt] = []
        for item in range(eval_size):
            name, row = held_out.item(item)
            self._held_out.append(renderer.prompt(f"{name}/eval-{item}", row))
        self._held_out_keys = {question_key(p.messages) for p in self._held_out}
        self.prompt(0)  # a task that cannot be rendered fails here, before anything is loaded

    def prompt(self, index: int) -> Prompt:
        """See PromptSource. An item whose question is held out is replaced by the next item.

        Raises ValueError when every question is held out, or when a prompt is too long.
        """
        first = item_at(index, self._size, self._order_seed)
        for step in range(self._size):
            item = (first + step) % self._size
            name, row = self._train.item(item)
            prompt = self._renderer.prompt(f"{name}/{item}", row)
            if question_key(prompt.messages) not in self._held_out_keys:
                return prompt
        raise ValueError(
            f"task.eval_size: the {len(self._held_out)} held-out prompts have every question of "
            f"the {self._size} items of {', '.join(self._train.names)}; lower it, raise task.size "
            "or widen task.config"
        )

    def eval_prompts(self, n: int) -> list[Prompt]:
        """See PromptSource."""
        return first_held_out(self._held_out, n)


class _Mixture:
    """Numbered items of datasets mixed by weight."""

    def __init__(self, mixture: Sequence[MixtureItem], *, seed: int, size: int) -> None:
        self.names = [m.name for m in mixture]
        self._weights = [m.weight for m in mixture]
        self._configs = [m.config for m in mixture]
        self._seed = seed
        self._datasets = [_create(m, seed=seed, size=size) for m in mixture]

    def item(self, item: int) -> tuple[str, dict[str, Any]]:
        """(dataset name, row), a pure function of the seed and the number."""
        draw = random.Random(f"{self._seed}/{item}")
        which = draw.choices(range(len(self.names)), self._weights)[0]
        name, config = self.names[which], self._configs[which]
        # The scorers of some datasets read their config, so it travels with the entry.
        return name, {**self._datasets[which][item], "dataset": name, "config": config}


def _create(item: MixtureItem, *, seed: int, size: int) -> ProceduralDataset:
    """The dataset, or a ValueError that says which name, key or value is wrong."""
    if item.name not in DATASETS:
        raise ValueError(
            f"task.name: reasoning-gym has no dataset {item.name!r}; {nearest(item.name, DATASETS)}"
        )
    known = {f.name for f in fields(DATASETS[item.name][1])} - {"seed", "size"}
    for key in item.config:
        if key not in known:
            raise ValueError(
                f"task.config: {item.name} has no option {key!r}; {nearest(key, known)}"
            )
    try:
        return create_dataset(item.name, seed=seed, size=size, **item.config)
    # reasoning-gym checks its options with asserts and plain comparisons.
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(
            f"task.config: {item.name} refuses {shown(item.config)}: {error}"
        ) from error
