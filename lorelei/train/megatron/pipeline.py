"""Rows through the model, forward and back, by Megatron's schedules.

Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lorelei.model.config import DecoderConfig
from lorelei.train.megatron.context import of_all_items
from lorelei.train.megatron.head import Vocabulary, item_logprobs
from lorelei.train.megatron.layout import Layout
from lorelei.train.megatron.linear import AdaptedLinear
from lorelei.train.megatron.row import Bound, Row
from lorelei.train.megatron.sites import find_sites, head_rows

# gets log-probabilities and entropies [I] of a row, returns its loss
Judge = Callable[[Row, Tensor, Tensor], Tensor]


class Pipeline:
    """The model of this rank, and what runs through it."""

    def __init__(self, model: Any, config: DecoderConfig, layout: Layout, recompute: bool) -> None:
        self._model, self._config, self._layout = model, config, layout
        self.device = next(model.parameters()).device
        self.sites = find_sites(model, config, layout)
        bound = Bound()
        for layer in model.decoder.layers:
            bound.to_layer(layer)
        for site in self.sites:
            if not layout.last_stage or site.module is not model.output_layer:
                AdaptedLinear(site, layout, bound)
        # ranks that meet within a layer must all come back through it; and a recomputed layer has
        # no gradients to give where its input has none
        if layout.experts_span_ranks or recompute:
            _want_gradients(model)

    def forward(self, rows: Sequence[Row], judge: Judge) -> None:
        """Without gradients; what the judge returns is ignored."""
        with torch.no_grad():
            self._run(rows, judge, forward_only=True)

    def forward_backward(self, rows: Sequence[Row], judge: Judge) -> None:
        """Add the gradients of the losses. Raises what the judge raises, after all rows."""
        self._run(rows, judge, forward_only=False)

    def _run(self, rows: Sequence[Row], judge: Judge, forward_only: bool) -> None:
        if not rows:
            return
        errors: list[Exception] = []

        def judged(row: Row, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            # the other stages and ranks wait for this row to come back, whatever happens here
            if row.piece is not None and not errors:
                try:
                    return judge(row, logprobs_I, entropy_I)
                except Exception as error:
                    errors.append(error)
            return logprobs_I.sum() * 0

        def step(waiting: Iterator[Row], model: Any) -> tuple[Tensor, Any]:
            row = next(waiting)
            output = model(
                input_ids=row.tokens_t[None],
                position_ids=row.positions_t[None],
                attention_mask=None,
                packed_seq_params=row,
                output_processor=self._head,
            )
            if not self._layout.last_stage:
                return output, None
            return judged(row, *output), _as_it_is

        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(rows),
            model=[self._model],
            num_microbatches=len(rows),
            seq_length=0,  # rows vary
            micro_batch_size=1,
            forward_only=forward_only,
        )
        if errors:
            raise errors[0]

    def _head(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        packed_seq_params: Row,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        first, stop = head_rows(self._config, self._layout)
        weight = output_layer.weight if output_weight is None else output_weight
        vocabulary = Vocabulary(weight[: stop - first], first, self._layout.tensor)
        row = packed_seq_params
        outputs = item_logprobs(hidden_states, row, vocabulary, output_layer, self._layout)
        count = len(row.here_i) if row.piece is None else len(row.piece.items)
        return of_all_items(outputs, row.here_i, count, self._layout.context)


def _as_it_is(loss: Tensor) -> tuple[Tensor, Tensor, None]:
    """To Megatron: a loss that is a sum already."""
    return loss, torch.ones((), dtype=torch.int), None


def _want_gradients(model: Any) -> None:
    """Have the embeddings, which are frozen, take part in the backward pass."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return output.requires_grad_() if torch.is_grad_enabled() else None

    if model.pre_process:
        model.embedding.register_forward_hook(hook)
