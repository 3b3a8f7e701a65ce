"""Whole runs with every environment: the tokens trained on are those that the engine sampled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lorelei.inference.contract import InferenceEngine
from lorelei.launch.assemble import RunComponents
from lorelei.run_file import load_config
from lorelei.train.work import Work
from lorelei.types import Completion, GenerateRequest, Group, Rollout, Turn
from tests.loops import before_training, open_loop, rl, whole
from tests.rollout_kinds import ROLLOUTS, rollout_section
from tests.tiny_models import make_tiny
from tests.tiny_runs import make_workplace, records, write_run

CODE = '''
def talk(messages, data, turns_left):
    """Asks twice more, then rewards all that was said."""
    data["heard"] = data.get("heard", "") + messages[-1]["content"]
    if turns_left:
        return f"Again, {turns_left}."
    return len(set(data["heard"])), {"heard": len(data["heard"])}


async def lookup(word: str) -> str:
    """Look a word up.

    Args:
        word: The word.
    """
    return word[::-1]


async def agent(client, model, data, messages):
    """Three turns of one conversation, and one of another beside it."""
    said = list(messages)
    beside = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "An aside."}], max_tokens=3
    )
    texts = []
    for _ in range(3):
        answer = await client.chat.completions.create(model=model, messages=said)
        message = answer.choices[0].message
        texts.append(message.content)
        said += [message, {"role": "user", "content": "Go on."}]
    await beside
    return len(set("".join(texts))), {"letters": sum(map(len, texts))}


async def fails(client, model, data):
    if int(data["answer"]) % 2:
        raise RuntimeError("odd")
    answer = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hm?"}]
    )
    return len(set(answer.choices[0].message.content))
'''

TOOL_AGENT = """
import json

WORD = {"type": "object", "properties": {"word": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": WORD}}]


async def agent(client, model, messages):
    ask = client.chat.completions.create
    answer = await ask(model=model, messages=messages, tools=TOOLS)
    message = answer.choices[0].message
    if message.tool_calls:
        assert answer.choices[0].finish_reason == "tool_calls" and message.content == "Well."
        messages.append(message)
        for call in message.tool_calls:
            word = json.loads(call.function.arguments)["word"]
            said = {"role": "tool", "tool_call_id": call.id, "content": word[::-1]}
            messages.append(said)
        message = (await ask(model=model, messages=messages, tools=TOOLS)).choices[0].message
    return len(set(message.content or ""))
"""

ENVIRONMENTS: dict[str, dict[str, Any]] = {
    # no tiny random model scores above 1.0: every episode has all its turns
    "multi_turn": {"env": {"kind": "multi_turn", "max_turns": 3, "turn_discount": 0.9}},
    "tools": {"env": {"kind": "tools", "tools": ["calculator", "code.py:lookup"]}},
    "python": {
        "env": {"kind": "python", "path": "code.py:talk", "max_turns": 3},
        "reward": {"kind": "env"},
    },
    "agent": {
        "env": {"kind": "agent", "path": "code.py:agent", "timeout": 60},
        "reward": {"kind": "env"},
    },
}
CONTEXT = 4096  # descriptions of tools are long in the tokens of a tiny tokenizer
TURNS = {"multi_turn": {3}, "tools": {1}, "python": {3}, "agent": {4}}


Said = Callable[[GenerateRequest], str | None]


class Recording:
    """A rollout engine, and all that passes its border.

    `said` may decide what a request draws: as if by chance, so with the log-probabilities that
    the engine gives these tokens.
    """

    def __init__(
        self, engine: InferenceEngine, tokenizer: PreTrainedTokenizerFast, said: Said
    ) -> None:
        self._engine, self._tokenizer, self._said = engine, tokenizer, said
        self.sampled: list[tuple[GenerateRequest, Completion]] = []

    async def generate(self, request: GenerateRequest) -> Completion:
        completion = await self._engine.generate(request)
        if (text := self._said(request)) is not None:
            completion = await self._drawn(request, completion, text)
        self.sampled.append((request, completion))
        return completion

    async def _drawn(
        self, request: GenerateRequest, completion: Completion, text: str
    ) -> Completion:
        tokens = np.array([*self._tokenizer(text)["input_ids"], 2], np.int32)
        whole = np.concatenate([request.tokens, tokens])
        temperature = request.sampling.temperature or 1.0
        (score,) = await self._engine.score([whole], request.adapter, temperature)
        return Completion(
            tokens=tokens,
            logprobs=score[-len(tokens) :],
            versions=((completion.versions[0][0], len(tokens)),),
            finish_reason="stop",
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass(slots=True, kw_only=True)
class Played:
    """A finished run: its folder, what was trained on, what the engine sampled."""

    folder: Path
    groups: list[Group] = field(default_factory=list[Group])
    sampled: Sequence[tuple[GenerateRequest, Completion]] = ()

    def rollouts(self) -> list[Rollout]:
        return [r for group in self.groups for r in group.rollouts]


Play = Callable[..., Played]


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast
) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("place"), tiny_tokenizer)
    make_tiny("llama", folder / "model", max_position_embeddings=CONTEXT)
    (folder / "code.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module", params=ROLLOUTS)
def play(
    request: pytest.FixtureRequest, place: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> Iterator[Play]:
    """Trains a configuration with the engine of this round, watching its border.

    A run is played once: the tests that ask for the same name look at the same run.
    """
    kind, played = request.param, dict[str, Played]()
    with rollout_section(kind, place / "model", CONTEXT) as section:

        def play(name: str, said: Said = lambda request: None, /, **sections: Any) -> Played:
            if name not in played:
                path = write_run(
                    place,
                    f"{name}-{kind}",
                    runs_dir=str(place / "runs"),
                    rollout={"n_samples": 4, "max_new_tokens": 8, **section},
                    **{"steps": 2, **sections},
                )
                run = _play(path, tiny_tokenizer, said)
                played[name] = asyncio.run(asyncio.wait_for(run, 120))
            return played[name]

        yield play


async def _play(path: Path, tokenizer: PreTrainedTokenizerFast, said: Said) -> Played:
    config = load_config(path)
    played = Played(folder=Path(config.runs_dir) / config.name)

    def recording(parts: RunComponents) -> Any:
        engine = Recording(parts.sampler.engine, tokenizer, said)
        played.sampled = engine.sampled
        return engine

    async with open_loop(path, played.folder, recording) as loop:

        def record(works: Sequence[Work]) -> None:
            for work in works:
                played.groups += rl(loop, work.adapter).collector.taken

        before_training(loop, record)
        await whole(loop)
    return played


def goes_on(turn: Turn, before: Turn) -> bool:
    """Whether a turn's prompt begins with all tokens of an earlier one, as they were sampled."""
    said = [*before.prompt.tolist(), *before.completion.tokens.tolist()]
    return turn.prompt.tolist()[: len(said)] == said


def assert_as_sampled(played: Played) -> None:
    """Every turn is one request and its completion, unchanged, and none is there twice."""
    turns = [turn for rollout in played.rollouts() for turn in rollout.turns]
    assert len({id(turn.completion) for turn in turns}) == len(turns)
    requests = {id(completion): request for request, completion in played.sampled}
    for turn in turns:
        np.testing.assert_array_equal(requests[id(turn.completion)].tokens, turn.prompt)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_environment_trains_on_the_tokens_that_were_sampled(play: Play, name: str) -> None:
    played = play(name, **ENVIRONMENTS[name])
    assert_as_sampled(played)
    rollouts = played.rollouts()
    assert len(rollouts) == 2 * 2 * 4
    assert {len(r.turns) for r in rollouts} == TURNS[name]
    assert [r.error for r in rollouts] == [None] * len(rollouts)
    for record in records(played.folder, "step"):
        # another tokenisation of what was sampled would part sampler and trainer
        assert record["kl_sampler"] < 1e-6 and record["ratio_max"] < 1.001
        assert record["grad_norm"] > 0
        assert record["turns_mean"] == max(TURNS[name])


@pytest.mark.parametrize("name", ["multi_turn", "python"])
def test_later_turns_continue_the_tokens_of_earlier_ones(play: Play, name: str) -> None:
    for rollout in play(name, **ENVIRONMENTS[name]).rollouts():
        pairs = zip(rollout.turns, rollout.turns[1:], strict=False)
        assert all(goes_on(later, earlier) for earlier, later in pairs)


def test_an_agents_conversations_are_each_continued(
    play: Play, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    for rollout in play("agent", **ENVIRONMENTS["agent"]).rollouts():
        talk = [t for t in rollout.turns if "An aside" not in tiny_tokenizer.decode(t.prompt)]
        assert len(talk) == 3 and len(rollout.turns) == 4
        assert goes_on(talk[1], talk[0]) and goes_on(talk[2], talk[1])


def test_an_agent_that_fails_costs_its_own_rollouts(play: Play) -> None:
    section = {"env": {"kind": "agent", "path": "code.py:fails"}, "reward": {"kind": "env"}}
    played = play("fails", **section)
    assert {group.prompt.data["answer"] for group in played.groups} <= {
        str(n) for n in range(0, 64, 2)
    }
    errors = [record["errors"] for record in records(played.folder, "step")]
    assert sum(e.get("environment raised RuntimeError", 0) for e in errors) % 4 == 0
    assert any(errors)


CALL = '<tool_call>\n{"name": "lookup", "arguments": {"word": "abc"}}\n</tool_call>'


def calls_first(request: GenerateRequest) -> str | None:
    """The first answers of every other rollout call a tool: a tiny random model would not."""
    where, _, turn = request.key.rpartition("/")  # the canary's key has no turn
    return f"Well. {CALL}" if turn == "0" and int(where[-1]) % 2 == 0 else None


def assert_calls_were_answered(played: Played, tokenizer: PreTrainedTokenizerFast) -> None:
    called = [r for r in played.rollouts() if len(r.turns) == 2]
    assert len(called) == len(played.rollouts()) // 2
    for first, second in (r.turns for r in called):
        assert goes_on(second, first)
        added = second.prompt[len(first.prompt) + len(first.completion.tokens) :]
        assert tokenizer.decode(added) == (
            "\n<|im_start|>user\n<tool_response>\ncba\n</tool_response><|im_end|>\n"
            "<|im_start|>assistant\n"
        )
    assert_as_sampled(played)
    for record in records(played.folder, "step"):
        assert record["kl_sampler"] < 1e-6 and record["ratio_max"] < 1.001


def test_tool_calls_are_answered_and_trained_on(
    play: Play, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    played = play("calls", calls_first, **ENVIRONMENTS["tools"])
    assert_calls_were_answered(played, tiny_tokenizer)
    assert {r.metrics["tool_calls"] for r in played.rollouts()} == {0.0, 1.0}
    assert {r.metrics["tool_errors"] for r in played.rollouts()} == {0.0}


def test_an_openai_agent_uses_tools(
    play: Play, place: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    (place / "tool_agent.py").write_text(TOOL_AGENT)
    env = {"kind": "agent", "path": "tool_agent.py:agent", "timeout": 60}
    played = play("tool-agent", calls_first, env=env, reward={"kind": "env"})
    assert_calls_were_answered(played, tiny_tokenizer)
