"""Plays one episode of env.kind tools with scripted answers, on the model in ./model.

usage: python play.py ANSWER...
"""

import asyncio
import sys
from pathlib import Path

import numpy as np

from lorelei.data.chat import ChatTemplate
from lorelei.data.reply import decoder_of
from lorelei.env.tool import load_tool
from lorelei.env.tools import ToolUsing
from lorelei.model.tokenizer import load_tokenizer
from lorelei.reward.contract import RewardResult
from lorelei.types import Completion, Prompt, Turn

tok = load_tokenizer(Path("model"))
stop = tok.eos_token_id
chat = ChatTemplate(tokenizer=tok, stop_token_ids=(stop,))
script = sys.argv[1:]


class Reward:
    async def score(self, data, text):
        print("SCORED", repr(text))  # noqa: T201
        return RewardResult(value=1.0)


said = []


async def sample(tokens, turn=0, **kw):
    ids = np.asarray([*tok(script[min(len(said), len(script) - 1)])["input_ids"], stop], np.int32)
    said.append(1)
    done = Completion(
        tokens=ids,
        logprobs=np.zeros(len(ids), np.float32),
        versions=((0, len(ids)),),
        finish_reason="stop",
    )
    return Turn(prompt=tokens, completion=done, text=decoder_of(tok)(ids))


env = ToolUsing(
    reward=Reward(),
    chat=chat,
    context=4096,
    max_turns=4,
    tools={"calculator": load_tool("calculator")},
    timeout=5,
)
ask = {"role": "user", "content": "1+1?"}
prompt = Prompt(id="x", tokens=chat.prompt([ask]), messages=(ask,), data={"answer": "2"})
print(asyncio.run(env.run(prompt, sample)).metrics)  # noqa: T201
