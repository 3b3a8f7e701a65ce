"""What the embedded engine's sampler draws and reports."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lorelei.inference.embedded.sampler import RowParams, sample, uniform_stream
from lorelei.types import SamplingParams

CPU = torch.device("cpu")


def draw(logits_V: Tensor, uniforms: np.ndarray, **params: float) -> tuple[np.ndarray, np.ndarray]:
    """One row for every uniform number."""
    rows = len(uniforms)
    row_params = RowParams.of([SamplingParams(**params)] * rows, CPU)  # type: ignore[arg-type]
    tokens, logprobs = sample(logits_V.repeat(rows, 1), row_params, uniforms)
    return tokens.numpy(), logprobs.numpy()


def chi_square(tokens: np.ndarray, probabilities: Tensor) -> float:
    """Standard deviations above the mean of chi-square with V - 1 degrees of freedom."""
    expected = probabilities.numpy() * len(tokens)
    counts = np.bincount(tokens, minlength=len(expected))
    assert counts[expected == 0].sum() == 0
    statistic = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = (expected > 0).sum() - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def logits(vocab: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("vocab", [7, 256, 300, 512, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_frequencies_are_those_of_the_softmax(vocab: int, temperature: float) -> None:
    scores = logits(vocab, scale=1.0)
    uniforms = uniform_stream(0, f"{vocab}", 20_000)
    tokens, _ = draw(scores, uniforms, temperature=temperature)
    # 4 standard deviations: one in 10^4 by chance, and the seed is fixed
    assert chi_square(tokens, (scores.double() / temperature).softmax(-1)) < 4


@pytest.mark.parametrize("vocab", [7, 256, 700])
def test_a_token_is_the_inverse_of_the_cumulative_distribution(vocab: int) -> None:
    scores = logits(vocab)
    uniforms = np.linspace(0, 1, 501)[:-1]
    tokens, _ = draw(scores, uniforms)
    ends = scores.double().softmax(-1).cumsum(-1)
    ends[-1] = 1
    expected = torch.searchsorted(ends, torch.from_numpy(uniforms), right=True).numpy()
    # fp32 masses move an end by 1e-7; a grid of 500 rarely falls that near to one
    assert (tokens != expected).sum() <= 1


def test_the_largest_uniform_number_draws_a_token_that_has_mass() -> None:
    scores = torch.full((600,), -torch.inf)
    scores[3], scores[270] = 0.0, 1.0
    below_one = np.nextafter(1.0, 0.0)
    tokens, logprobs = draw(scores, np.array([0.0, 0.2, 0.5, below_one]))
    assert tokens.tolist() == [3, 3, 270, 270]
    assert np.allclose(logprobs, scores.log_softmax(-1)[tokens].numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_of_the_full_scaled_vocabulary(dtype: torch.dtype, temperature: float) -> None:
    scores = logits(5000, scale=4.0).to(dtype)
    tokens, logprobs = draw(scores, uniform_stream(1, "x", 64), temperature=temperature)
    expected = (scores.double() / temperature).log_softmax(-1)[tokens].numpy()
    assert np.abs(logprobs - expected).max() < (1e-12 if dtype == torch.float64 else 2e-6)


def test_temperature_0_takes_the_best_token_and_reports_temperature_1() -> None:
    scores = logits(400)
    tokens, logprobs = draw(scores, uniform_stream(0, "", 5), temperature=0.0)
    assert set(tokens.tolist()) == {int(scores.argmax())}
    assert np.allclose(logprobs, scores.log_softmax(-1).max().item(), atol=1e-6)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0, 1}),  # 0.4 is not yet a half
        ({"top_p": 0.39}, {0}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.6}, {0, 1}),
        ({"top_k": 3, "top_p": 0.5}, {0, 1}),  # 0.4 / 0.9 is not yet a half
        ({"top_k": 2, "top_p": 0.5}, {0}),  # 0.4 / 0.7 is
        ({"top_k": 99}, {0, 1, 2, 3}),
    ],
)
def test_truncation_draws_only_what_it_keeps_and_reports_the_full_distribution(
    params: dict[str, float], kept: set[int]
) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    tokens, logprobs = draw(probabilities.log(), uniform_stream(0, "t", 4000), **params)
    assert set(tokens.tolist()) == kept
    left = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probabilities.tolist())])
    if len(kept) > 1:
        assert chi_square(tokens, left.double() / left.double().sum()) < 4
    assert np.allclose(logprobs, probabilities.log()[tokens].numpy())


def test_rows_with_different_parameters_do_not_touch_each_other() -> None:
    params = [
        SamplingParams(temperature=t, top_k=k)
        for t, k in ((1.0, 0), (0.0, 0), (0.5, 0), (1.0, 3), (2.0, 0))
    ]
    scores = torch.stack([logits(300, seed) for seed in range(5)])
    uniforms = uniform_stream(0, "m", 5)
    tokens, logprobs = sample(scores.clone(), RowParams.of(params, CPU), uniforms)
    for i, row in enumerate(params):
        token, logprob = sample(
            scores[i : i + 1].clone(), RowParams.of([row], CPU), uniforms[i : i + 1]
        )
        assert tokens[i] == token[0]
        assert logprobs[i] == logprob[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_a_logprob_that_is_nan(bad: float) -> None:
    scores = torch.stack([logits(300), logits(300)])
    scores[0, 5] = bad
    tokens, logprobs = sample(scores, RowParams.of([SamplingParams()] * 2, CPU), np.full(2, 0.5))
    assert logprobs.isnan().tolist() == [True, False]
    assert 0 <= int(tokens[0]) < 300


def test_streams_are_named_by_seed_and_key_and_do_not_depend_on_their_length() -> None:
    stream = uniform_stream(1, "a", 100)
    assert stream[:10].tolist() == uniform_stream(1, "a", 10).tolist()
    assert stream[0] != uniform_stream(2, "a", 1)[0]
    assert stream[0] != uniform_stream(1, "b", 1)[0]
    assert 0 <= stream.min() < stream.max() < 1
