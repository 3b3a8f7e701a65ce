"""One decoding step after another: prefill, sample, decode, leave.

Shapes: B rows, N prompts, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from lorelei.inference.embedded.attention import (
    FusedStepAttention,
    PrefillAttention,
    PromptRows,
    StepAttention,
    prompt_table,
    step_cache,
)
from lorelei.inference.embedded.flash_step import FlashSteps
from lorelei.inference.embedded.kv_cache import PromptCache, RowCache
from lorelei.inference.embedded.published import PublishedAdapters
from lorelei.inference.embedded.sampler import RowParams, sample
from lorelei.inference.embedded.scheduler import Prompt, Row, Scheduler
from lorelei.inference.embedded.whole_step import blocks, fits, whole_step
from lorelei.model.decoder import Decoder
from lorelei.model.kernels.build import rest
from lorelei.model.kernels.fused import Blocks, fuses
from lorelei.model.linear import Route
from lorelei.types import FinishReason

Outcome = FinishReason | FloatingPointError


@dataclass(frozen=True, slots=True)
class _Plan:
    """What stays the same between steps until a row enters or leaves."""

    rows: tuple[Row, ...]  # one adapter's together, and in these one prompt's
    lengths: tuple[int, ...]  # of the prompts
    slots: torch.Tensor | None  # [B]; None: row = slot
    groups: tuple[PromptRows, ...]
    prompts: torch.Tensor | None  # where there are kernels: `prompt_table` of the groups
    route: Route  # of the rows, and of padding rows (see flash_step)
    blocks: Blocks | None  # where one kernel makes the whole step
    params: RowParams


class Decoding:
    """The running rows' tensors. Everything here happens on the decode thread."""

    def __init__(
        self, decoder: Decoder, scheduler: Scheduler, published: PublishedAdapters
    ) -> None:
        self._decoder, self._scheduler, self._published = decoder, scheduler, published
        self._cache = RowCache(decoder)
        self._flash = FlashSteps(decoder, self._cache) if FlashSteps.fit(decoder) else None
        self._plan: _Plan | None = None
        self._adapters: set[str | None] = set()  # of the rows at the last settling
        self.tokens_generated = 0
        self.prompts_prefilled = 0

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Outcome]]:
        """Sample one token for every running row. Returns the rows that ended, and how."""
        ended: list[tuple[Row, Outcome]] = []
        if admitted := self._scheduler.admit(self._published.share_steps):
            self._plan = None
            self._settle()
            self._prefill(admitted)
            params = RowParams.of([r.request.sampling for r in admitted], self._decoder.device)
            drawn = sample(self._first_logits(admitted), params, _uniforms(admitted))
            ended += self._append(admitted, *drawn)
        if self._scheduler.running:
            plan = self._plan = self._plan or self._make_plan()
            drawn = sample(self._next_logits(plan), plan.params, _uniforms(plan.rows))
            ended += self._append(plan.rows, *drawn)
        return ended

    def leave(self, row: Row) -> None:
        """Take a running row out; memory that nobody needs any more is freed."""
        slot = self._scheduler.leave(row)
        last = len(self._scheduler.running)
        if slot < last and (kept := len(self._scheduler.running[slot].tokens) - 1) > 0:
            self._cache.move(last, slot, kept)
        self._plan = None
        if last == 0:
            self._cache.release()
            if self._flash is not None:
                self._flash.release()
            self._published.drop_merged()
            rest()

    def release(self) -> None:
        """Forget private weight copies; rows that still run keep their keys and values."""
        self._plan = None
        if self._flash is not None:
            self._flash.forget()
        self._published.drop_merged()

    def _settle(self) -> None:
        adapters = {row.prompt.adapter for row in self._scheduler.running}
        if self._flash is not None and adapters != self._adapters:
            self._flash.forget()  # first: they keep a merged copy alive
        self._adapters = adapters
        self._published.settle(adapters, max(map(self._scheduler.pending_steps, adapters)))

    def _prefill(self, rows: Sequence[Row]) -> None:
        """Run the prompts that have no cache yet, packed."""
        prompts = [p for p in self._prompts(rows) if p.cache is None]
        if not prompts:
            return
        device = self._decoder.device
        lengths = [len(p.tokens) for p in prompts]
        caches = [PromptCache(self._decoder, length) for length in lengths]
        hidden_TD = self._published.decoder(prompts[0].adapter)(
            torch.from_numpy(np.concatenate([p.tokens for p in prompts])).long().to(device),
            torch.cat([torch.arange(length, device=device) for length in lengths]),
            self._published.route([p.adapter for p in prompts for _ in p.tokens]),
            PrefillAttention(lengths, caches),
        )
        last = np.cumsum(lengths) - 1
        for prompt, cache, at in zip(prompts, caches, last.tolist(), strict=True):
            cache.hidden.copy_(hidden_TD[at])
            prompt.cache = cache
        self.prompts_prefilled += len(prompts)

    def _prompts(self, rows: Sequence[Row]) -> list[Prompt]:
        """The rows' different prompts, those of one adapter together."""
        different = dict.fromkeys(row.prompt for row in rows)
        return sorted(different, key=lambda p: (p.adapter or "", p.number))

    def _first_logits(self, rows: Sequence[Row]) -> torch.Tensor:
        """[B, V] behind the prompts of rows, which are prefilled."""
        prompts = self._prompts(rows)
        hidden_ND = torch.stack([p.cache.hidden for p in prompts if p.cache is not None])
        route = self._published.route([p.adapter for p in prompts])
        number = {p: i for i, p in enumerate(prompts)}
        index = torch.tensor([number[r.prompt] for r in rows])
        head = self._published.decoder(prompts[0].adapter).head
        return route(head, hidden_ND)[index.to(hidden_ND.device)]

    def _next_logits(self, plan: _Plan) -> torch.Tensor:
        """[B, V] behind every row's last token, which goes into the cache."""
        device = self._decoder.device
        held = [len(row.tokens) - 1 for row in plan.rows]
        tokens = [row.tokens[-1] for row in plan.rows]
        decoder = self._published.decoder(plan.rows[0].prompt.adapter)
        if self._flash is not None:
            return self._flash.logits(tokens, held, decoder, plan.route)
        longest = max(held)
        self._cache.reserve(len(held), longest + 1)
        tokens_B = torch.tensor(tokens, device=device)
        lengths_B = torch.tensor(held, device=device)
        positions_B = lengths_B + torch.tensor(plan.lengths, device=device)
        if plan.prompts is None:
            attend = StepAttention(self._cache, plan.groups, plan.slots, lengths_B, longest)
            hidden_BD = decoder(tokens_B, positions_B, plan.route, attend)
        else:
            cache = step_cache(self._cache, plan.prompts, plan.slots, lengths_B, longest)
            if plan.blocks is None:
                attend = FusedStepAttention(cache)
                hidden_BD = decoder(tokens_B, positions_B, plan.route, attend)
            else:
                hidden_BD = whole_step(decoder, plan.blocks, tokens_B, positions_B, cache)
        return plan.route(decoder.head, hidden_BD)

    def _make_plan(self) -> _Plan:
        self._settle()
        order = self._scheduler.by_prompt()
        rows = tuple(self._scheduler.running[slot] for slot in order)
        prompts = [row.prompt for row in rows]
        groups: list[PromptRows] = []
        start = 0
        for prompt, members in groupby(prompts):
            stop = start + len(list(members))
            assert prompt.cache is not None, "running rows are prefilled"
            groups.append(PromptRows(start, stop, prompt.cache))
            start = stop
        device = self._decoder.device
        adapters = [prompt.adapter for prompt in prompts]
        if self._flash is not None:
            adapters = self._flash.plan(order, groups, adapters)
        route = self._published.route(adapters)
        decoder = self._published.decoder(prompts[0].adapter)
        return _Plan(
            rows,
            tuple(len(prompt.tokens) for prompt in prompts),
            None if order == sorted(order) else torch.tensor(order, device=device),
            tuple(groups),
            prompt_table(groups) if fuses(self._decoder.embedding) else None,
            route,
            blocks(decoder, route) if fits(decoder) else None,
            RowParams.of([row.request.sampling for row in rows], device),
        )

    def _append(
        self, rows: Sequence[Row], tokens_B: torch.Tensor, logprobs_B: torch.Tensor
    ) -> list[tuple[Row, Outcome]]:
        """Give every row its token, and let those leave that end with it."""
        drawn = zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True)
        ended: list[tuple[Row, Outcome]] = []
        for row, token, logprob in drawn:
            if (outcome := _append(row, token, logprob)) is not None:
                ended.append((row, outcome))
        for row, _ in ended:
            self.leave(row)
        self.tokens_generated += len(rows)
        return ended


def _uniforms(rows: Sequence[Row]) -> np.ndarray:
    """[B] what each row's next token is drawn by."""
    return np.array([row.uniforms[len(row.tokens)] for row in rows])


def _append(row: Row, token: int, logprob: float) -> Outcome | None:
    if logprob != logprob:
        who = row.request.adapter or "the base model"
        return FloatingPointError(f"{who}: the logits of a sequence are not finite")
    row.tokens.append(token)
    row.logprobs.append(logprob)
    if token in row.request.sampling.stop_token_ids:
        return "stop"
    if row.stops is not None and row.stops.completes(token):
        return "stop"
    return "length" if len(row.tokens) == row.limit else None
