"""A frozen model whose numbers go elsewhere and come back."""

from __future__ import annotations

import torch
from torch import nn

from lorelei.model.backend import HOST, move


def test_parameters_stay_the_objects_they_are_and_their_numbers_move() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    model.requires_grad_(False)
    before = dict(model.named_parameters())
    held = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    old = [t.data for t in model.state_dict(keep_vars=True).values()]  # keeps their addresses
    move(model, HOST)
    after = model.state_dict(keep_vars=True)
    assert all(parameter is after[name] for name, parameter in before.items())
    assert model[2].weight is model[0].weight
    for name, (address, numbers) in held.items():
        assert after[name].data_ptr() != address and torch.equal(after[name], numbers), name
    assert not any(t.requires_grad for t in after.values()) and len(old) == len(held)
