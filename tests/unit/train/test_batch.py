"""From rollouts to segments and items: every sampled token is predicted once, from its context."""

from __future__ import annotations

import numpy as np
import pytest

from lorelei.train.batch import comparison_batch, concatenate, example_batch, rollout_batch
from lorelei.types import Batch, Comparison, Example, Rollout
from tests.episodes import constant, random_group, rollout, turn


def built(*groups: list[Rollout] | tuple[Rollout, ...]) -> Batch:
    """The batch of groups, with each rollout's reward as its advantage."""
    values = constant(groups, [[r.reward or 0.0 for r in group] for group in groups])
    return rollout_batch("a", groups, {"advantage": values}, temperature=0.8)


def predictions(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """(all tokens an item is predicted from, its target), in item order."""
    starts = np.cumsum([0, *(len(s.tokens) for s in batch.segments)])
    found: list[tuple[tuple[int, ...], int]] = []
    for source, target in zip(batch.items.source, batch.items.target, strict=True):
        at = int(np.searchsorted(starts, source, side="right")) - 1
        context = batch.segments[at].tokens[: source - starts[at] + 1].tolist()
        while (at := batch.segments[at].parent) >= 0:
            context = batch.segments[at].tokens.tolist() + context
        found.append((tuple(context), int(target)))
    return found


def expected(*rollouts: Rollout) -> list[tuple[tuple[int, ...], int]]:
    """The same, read off the turns."""
    return [
        (tuple([*t.prompt.tolist(), *t.completion.tokens[:i].tolist()]), int(token))
        for r in rollouts
        for t in r.turns
        for i, token in enumerate(t.completion.tokens)
    ]


def assert_positions_continue(batch: Batch) -> None:
    for segment in batch.segments:
        if segment.parent < 0:
            assert segment.start == 0
        else:
            above = batch.segments[segment.parent]
            assert segment.start == above.start + len(above.tokens)


def test_samples_of_a_group_share_their_prompt_as_one_segment() -> None:
    group = [rollout(turn([1, 2, 3], [4, 5])), rollout(turn([1, 2, 3], [6, 7, 8]))]
    batch = built(group)
    assert [s.tokens.tolist() for s in batch.segments] == [[1, 2, 3], [4], [6, 7]]
    assert [s.parent for s in batch.segments] == [-1, 0, 0]
    assert [s.start for s in batch.segments] == [0, 3, 3]
    # both first tokens come from the prompt's last position
    assert batch.items.source.tolist() == [2, 3, 2, 4, 5]
    assert batch.items.target.tolist() == [4, 5, 6, 7, 8]
    assert predictions(batch) == expected(*group)


def test_columns_are_those_of_each_token_and_its_rollout() -> None:
    group = [
        rollout(turn([1], [2, 3], [-0.5, -0.25]), reward=1.5),
        rollout(turn([1], [4], [-2.0]), reward=-1.5),
    ]
    items = built(group, [rollout(turn([9], [9], [-3.0]), reward=7.0)]).items
    assert items.streams["behaviour"].tolist() == [-0.5, -0.25, -2.0, -3.0]
    assert items.streams["advantage"].tolist() == [1.5, 1.5, -1.5, 7.0]
    assert items.sequence.tolist() == [0, 0, 1, 2]
    assert items.weight.tolist() == [1.0] * 4
    np.testing.assert_allclose(items.temperature, 0.8)
    assert items.source.dtype == items.target.dtype == items.sequence.dtype == np.int64


def test_credit_of_each_token_goes_where_the_token_stands() -> None:
    one = rollout(turn([1, 2], [3, 4]), turn([7], [8]), turn([1, 2, 3, 4, 5], [6]))
    credit = np.array([0.1, 0.2, 0.3, 0.4], np.float32)  # of 3, 4, 8 and 6: the order of turns
    batch = rollout_batch("a", [[one]], {"advantage": [[credit]]}, 1.0)
    assert batch.items.target.tolist() == [3, 4, 6, 8]  # rows: 1 2 3 4 5 6, then 7 8
    np.testing.assert_array_equal(batch.items.streams["advantage"], credit[[0, 1, 3, 2]])


def test_completions_of_one_token_need_no_segment_of_their_own() -> None:
    group = [rollout(turn([1, 2], [3])), rollout(turn([1, 2], [4]))]
    batch = built(group)
    assert [s.tokens.tolist() for s in batch.segments] == [[1, 2]]
    assert batch.items.source.tolist() == [1, 1] and batch.items.target.tolist() == [3, 4]


def test_turns_that_continue_each_other_are_one_row() -> None:
    one = rollout(
        turn([1, 2], [3, 4]), turn([1, 2, 3, 4, 5], [6, 7]), turn([1, 2, 3, 4, 5, 6, 7], [8])
    )
    batch = built([one, rollout(turn([1, 2], [9]))])
    assert [s.tokens.tolist() for s in batch.segments] == [[1, 2], [3, 4, 5, 6, 7]]
    assert predictions(batch) == expected(one, rollout(turn([1, 2], [9])))
    assert batch.items.sequence.tolist() == [0] * 5 + [1]


def test_a_rewritten_history_starts_a_row_that_shares_what_it_can() -> None:
    group = [
        rollout(turn([1, 2], [3, 4]), turn([1, 2, 7], [8, 9])),  # keeps the first prompt
        rollout(turn([1, 2], [5, 6]), turn([2, 2, 7], [8, 9])),  # keeps nothing
        rollout(turn([1, 2], [3, 4]), turn([1], [2, 5])),  # the prompt's second token was sampled
    ]
    batch = built(group)
    assert predictions(batch) == expected(*group)
    assert_positions_continue(batch)
    assert [s.parent for s in batch.segments] == [-1, 0, 0, 0, -1, 0]
    assert batch.items.sequence.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_turn_without_tokens_is_left_out() -> None:
    one = rollout(turn([1, 2], []), turn([1, 2, 3], [4]))
    batch = built([one, rollout(turn([1, 2], [5]))])
    assert predictions(batch) == [((1, 2, 3), 4), ((1, 2), 5)]


def test_groups_without_rollouts_are_left_out_but_not_all_of_them() -> None:
    assert predictions(built([], [rollout(turn([1], [2]))])) == [((1,), 2)]
    with pytest.raises(ValueError, match="adapter 'a': no rollout has a sampled token"):
        built([], [])


def test_random_episodes_predict_every_sampled_token_from_its_context() -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)

        def tokens(most: int, rng: np.random.Generator = rng) -> list[int]:
            # few different ids: chance prefixes must not confuse anything
            return rng.integers(0, 2, int(rng.integers(1, most + 1))).tolist()

        groups: list[list[Rollout]] = []
        for _ in range(int(rng.integers(1, 4))):
            ask, group = tokens(4), []
            for sample in range(int(rng.integers(1, 5))):
                turns = [turn(ask, tokens(4))]
                for _ in range(int(rng.integers(0, 3))):
                    last = [*turns[-1].prompt.tolist(), *turns[-1].completion.tokens.tolist()]
                    goes_on = rng.random() < 0.5
                    turns.append(turn([*last, *tokens(2)] if goes_on else tokens(6), tokens(3)))
                group.append(rollout(*turns, reward=float(sample)))
            groups.append(group)
        batch = built(*groups)
        assert predictions(batch) == expected(*(r for group in groups for r in group))
        assert_positions_continue(batch)


def test_batches_of_several_adapters_keep_their_items_and_get_distinct_sequences() -> None:
    rng = np.random.default_rng(0)
    groups = [[random_group(rng, 3, [2, 3], name)] for name in ("a", "b", "c")]
    batches = [rollout_batch(name, g, {}, 1.0) for name, g in zip("abc", groups, strict=True)]
    whole = concatenate(batches)
    assert whole.adapters == ("a", "b", "c")
    assert predictions(whole) == [p for b in batches for p in predictions(b)]
    assert sorted(set(whole.items.sequence.tolist())) == list(range(6))
    behaviour = np.concatenate([b.items.streams["behaviour"] for b in batches])
    np.testing.assert_array_equal(whole.items.streams["behaviour"], behaviour)


def test_answers_of_a_comparison_share_their_prompt_and_their_sequence() -> None:
    def ids(*tokens: int) -> np.ndarray:
        return np.array(tokens, np.int32)

    pairs = [
        Comparison(id="0", prompt=ids(1, 2, 3), answers=(ids(4, 5), ids(6)), signs=(1, -1)),
        Comparison(id="1", prompt=ids(7), answers=(ids(8), ids(9, 10, 11)), signs=(1, -1)),
    ]
    batch = comparison_batch("a", pairs)
    assert [s.tokens.tolist() for s in batch.segments] == [[1, 2, 3], [4], [7], [9, 10]]
    assert_positions_continue(batch)
    expected = [
        (tuple([*pair.prompt.tolist(), *answer[:i].tolist()]), int(token))
        for pair in pairs
        for answer in pair.answers
        for i, token in enumerate(answer)
    ]
    assert predictions(batch) == expected
    items = batch.items
    assert items.streams["answer"].tolist() == [1, 1, -1, 1, -1, -1, -1]
    assert items.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    # each comparison weighs the same, however long its answers are
    np.testing.assert_allclose(items.weight, [1 / 6] * 3 + [1 / 8] * 4, rtol=1e-6)


def test_examples_weigh_what_they_say_over_the_number_of_all_items() -> None:
    learnt = np.array([False, True, True])
    examples = [
        Example(id=str(n), tokens=np.arange(3, dtype=np.int32), predicted=learnt, weight=weight)
        for n, weight in enumerate((1.0, 2.0))
    ]
    batch = example_batch("a", examples)
    assert batch.items.weight.tolist() == [0.25, 0.25, 0.5, 0.5]
