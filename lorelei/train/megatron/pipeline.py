"""Rows through the model, forward and back, by Megatron's schedules.

Shapes: I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from lorelei.model.config import DecoderConfig
from lorelei.parallel.ulysses import of_all_items
from lorelei.train.adapter_engine import LossOf
from lorelei.train.megatron.head import Vocabulary, item_logprobs
from lorelei.train.megatron.linear import AdaptedLinear
from lorelei.train.megatron.mesh import MegatronMesh
from lorelei.train.megatron.row import Bound, Row
from lorelei.train.megatron.targets import find_targets, head_rows


class Pipeline:
    """The model of this rank, and what runs through it."""

    def __init__(
        self, model: Any, config: DecoderConfig, mesh: MegatronMesh, recompute: bool
    ) -> None:
        self._model, self._config, self._mesh = model, config, mesh
        self.device = next(model.parameters()).device
        self.targets = find_targets(model, config, mesh)
        bound = Bound()
        for layer in model.decoder.layers:
            bound.to_layer(layer)
        for target in self.targets:
            if not mesh.last_stage or target.module is not model.output_layer:
                AdaptedLinear(target, mesh, bound)
        # where experts span ranks, the backward pass of a layer is collective: no rank may skip it
        # because nothing below its adapters needs gradients; and a recomputed layer gives no
        # gradients where its input has none
        if mesh.experts_span_ranks or recompute:
            _want_gradients(model)

    def run(self, rows: Sequence[Row], loss_of: LossOf, trains: bool) -> None:
        """trains: add the gradients of the losses. Raises what `loss_of` raises, after all rows."""
        if not rows:
            return
        errors: list[Exception] = []

        def loss(row: Row, logprobs_I: Tensor, entropy_I: Tensor) -> Tensor:
            # the schedule is fixed: other stages and ranks wait for this row's backward pass, so an
            # error is kept until all rows are through
            if row.piece is not None and not errors:
                try:
                    return loss_of(row.piece, logprobs_I, entropy_I)
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
            if not self._mesh.last_stage:
                return output, None
            return loss(row, *output), _already_summed

        with torch.set_grad_enabled(trains):
            get_forward_backward_func()(
                forward_step_func=step,
                data_iterator=iter(rows),
                model=[self._model],
                num_microbatches=len(rows),
                seq_length=0,  # rows vary
                micro_batch_size=1,
                forward_only=not trains,
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
        first, stop = head_rows(self._config, self._mesh)
        weight = output_layer.weight if output_weight is None else output_weight
        vocabulary = Vocabulary(weight[: stop - first], first, self._mesh.tensor)
        row = packed_seq_params
        outputs = item_logprobs(hidden_states, row, vocabulary, output_layer, self._mesh)
        count = len(row.here_i) if row.piece is None else len(row.piece.items)
        return of_all_items(outputs, row.here_i, count, self._mesh.context)


def _already_summed(loss: Tensor) -> tuple[Tensor, Tensor, None]:
    """Tells Megatron's schedule not to divide the loss: it is a sum."""
    return loss, torch.ones((), dtype=torch.int), None


def _want_gradients(model: Any) -> None:
    """Have the embeddings, which are frozen, take part in the backward pass."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return output.requires_grad_() if torch.is_grad_enabled() else None

    if model.pre_process:
        model.embedding.register_forward_hook(hook)
