"""Runs inside vLLM's API server: the routes under /lorelei, as an ASGI middleware.

Tokens in, tokens and log-probabilities out; adapters by bytes, folder or broadcast. An answer that
takes long starts with blanks, so that read_timeout means a stuck connection.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

from vllm import SamplingParams
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from lorelei.inference.server.asgi import Exchange, Refused

PREFIX = "/lorelei/"
TOKEN = "LORELEI_SERVER_TOKEN"  # environment variable; required unless bound to loopback
POLL = 0.005  # seconds between two looks at a broadcast

Message = dict[str, Any]


class Routes:
    """ASGI middleware; all other paths are vLLM's."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._finished_tokens = 0
        self._sampling: set[str] = set()  # ids of running requests of `generate`

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        exchange = Exchange(receive, send)
        try:
            _check_token(scope)
            route = getattr(self, f"_{scope['path'].removeprefix(PREFIX)}", None)
            if route is None:
                raise Refused(405, f"{scope['path']}: there is no such route")
            query = {k: v[0] for k, v in parse_qs(scope["query_string"].decode()).items()}
            body = await exchange.body()
            state = scope["app"].state
            await exchange.answer(route(_Server(state), query, body))
        except Refused as refused:
            await exchange.finish(refused.status, {"error": str(refused)})
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the border: whatever happens is the answer
            await exchange.finish(500, {"error": f"{type(error).__name__}: {error}"})

    # --- sampling

    async def _generate(self, server: _Server, query: Message, body: bytes) -> Any:
        asked = json.loads(body)
        stops = asked["stop_strings"] if server.has_tokenizer else []
        params = SamplingParams(
            temperature=asked["temperature"],
            top_k=asked["top_k"],
            top_p=asked["top_p"],
            min_p=asked["min_p"],
            max_tokens=asked["limit"],
            seed=asked["seed"],
            stop_token_ids=asked["stop_token_ids"],
            stop=stops,
            ignore_eos=True,  # what stops an answer is asked for
            skip_special_tokens=False,
            detokenize=bool(stops),
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        name = uuid4().hex
        self._sampling.add(name)
        try:
            whole = await server.run(name, asked["tokens"], params, asked["adapter"])
        finally:
            self._sampling.discard(name)
        output = whole.outputs[0]
        tokens = list(output.token_ids)
        self._finished_tokens += len(tokens)
        return {
            "tokens": tokens,
            "logprobs": [
                entry[token].logprob
                for entry, token in zip(output.logprobs or [], tokens, strict=True)
            ],
            "finish_reason": output.finish_reason,
            "adapter": asked["adapter"],
        }

    async def _score(self, server: _Server, query: Message, body: bytes) -> Any:
        asked = json.loads(body)
        params = SamplingParams(
            temperature=asked["temperature"],
            max_tokens=1,
            prompt_logprobs=0,
            seed=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

        async def one(tokens: list[int]) -> list[float]:
            output = await server.run(uuid4().hex, tokens, params, asked["adapter"])
            entries = (output.prompt_logprobs or [])[1:]
            return [e[t].logprob for e, t in zip(entries, tokens[1:], strict=True)]

        return {"logprobs": await asyncio.gather(*map(one, asked["sequences"]))}

    # --- adapters

    async def _load(self, server: _Server, query: Message, body: bytes) -> Any:
        name = query["name"]
        if name not in server.adapters:
            await server.on_workers("lorelei_store", name, body)
            await server.add(name)
        return await server.installed(name)

    async def _load_folder(self, server: _Server, query: Message, body: bytes) -> Any:
        asked = json.loads(body)
        name, folder = asked["name"], asked["folder"]
        if name not in server.adapters:
            await server.on_workers("lorelei_read", name, folder)
            await server.add(name)
        return await server.installed(name)

    async def _join(self, server: _Server, query: Message, body: bytes) -> Any:
        asked = json.loads(body)
        keys = ("name", "host", "port", "size", "first_rank", "backend", "timeout")
        return await server.on_workers("lorelei_join", *(asked[key] for key in keys))

    async def _receive(self, server: _Server, query: Message, body: bytes) -> Any:
        asked = json.loads(body)
        return await server.on_workers(
            "lorelei_receive", asked["name"], asked["group"], asked["size"]
        )

    async def _load_received(self, server: _Server, query: Message, body: bytes) -> Any:
        name = json.loads(body)["name"]
        if name not in server.adapters:
            await server.add(name)
        return await server.installed(name)

    async def _leave(self, server: _Server, query: Message, body: bytes) -> Any:
        return await server.on_workers("lorelei_leave", json.loads(body)["group"])

    async def _unload(self, server: _Server, query: Message, body: bytes) -> Any:
        await server.remove(json.loads(body)["name"])
        return {}

    # --- control

    async def _pause(self, server: _Server, query: Message, body: bytes) -> Any:
        await server.engine.pause_generation(mode="keep", clear_cache=False)
        return {}

    async def _resume(self, server: _Server, query: Message, body: bytes) -> Any:
        await server.engine.resume_generation()
        return {}

    async def _abort(self, server: _Server, query: Message, body: bytes) -> Any:
        name = json.loads(body)["adapter"]
        meant = [k for k, r in server.requests.items() if name in (None, r.lora_name)]
        await server.engine.abort(meant, internal=True)
        return {}

    async def _sleep(self, server: _Server, query: Message, body: bytes) -> Any:
        if current_platform.is_cpu():
            await server.engine.pause_generation(mode="keep", clear_cache=True)
        else:
            await server.engine.sleep(level=1, mode="abort")
        return {}

    async def _wake(self, server: _Server, query: Message, body: bytes) -> Any:
        if current_platform.is_cpu():
            await server.engine.resume_generation()
        else:
            await server.engine.wake_up()
        return {}

    async def _status(self, server: _Server, query: Message, body: bytes) -> Any:
        await server.engine.check_health()
        running = sum(
            state.detokenizer.num_output_tokens()
            for state in server.requests.values()
            if state.external_req_id in self._sampling
        )
        return {"tokens": self._finished_tokens + running, "adapters": sorted(server.adapters)}

    async def _facts(self, server: _Server, query: Message, body: bytes) -> Any:
        config = server.engine.vllm_config
        workers = await server.ask_workers("lorelei_facts")
        return {
            "model": config.model_config.model,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "context": config.model_config.max_model_len - 1,
            "max_rank": config.lora_config.max_lora_rank if config.lora_config else 0,
            "logprobs_mode": config.model_config.logprobs_mode,
            "workers": len(workers),
            "device": workers[0]["device"],
            "scores": all(worker["scores"] for worker in workers),
            "stops_strings": server.has_tokenizer,
        }


class _Server:
    """vLLM's objects behind one request."""

    def __init__(self, state: Any) -> None:
        self.engine = state.engine_client
        self._models = state.openai_serving_models

    @property
    def adapters(self) -> Mapping[str, Any]:
        return self._models.lora_requests

    @property
    def requests(self) -> Mapping[str, Any]:
        return self.engine.output_processor.request_states

    @property
    def has_tokenizer(self) -> bool:
        return self.engine.renderer.tokenizer is not None

    async def run(
        self, name: str, tokens: list[int], params: SamplingParams, adapter: str | None
    ) -> RequestOutput:
        """The whole output of one request. Aborted when cancelled."""
        if adapter is not None and adapter not in self.adapters:
            raise Refused(404, f"adapter {adapter} is not loaded")
        request = self.adapters[adapter] if adapter is not None else None
        last: RequestOutput | None = None
        stream = self.engine.generate(
            TokensPrompt(prompt_token_ids=tokens), params, name, lora_request=request
        )
        async for output in stream:
            last = output
        if last is None:
            raise Refused(500, "no output")
        return last

    async def ask_workers(self, method: str, *args: Any) -> list[Message]:
        return await self.engine.collective_rpc(method, args=args)

    async def on_workers(self, method: str, *args: Any) -> Message:
        answers = await self.ask_workers(method, *args)
        _refuse(answers)
        return {}

    async def add(self, name: str) -> None:
        """Have vLLM load what the workers prepare, once it is ready."""
        answers = await self.ask_workers("lorelei_prepared", name)
        while any("waiting" in answer for answer in answers):
            await asyncio.sleep(POLL)
            answers = await self.ask_workers("lorelei_prepared", name)
        for answer in answers:
            if "missing" in answer:
                raise Refused(404, f"{name}: nothing has come: {answer['missing']}")
        _refuse(answers)
        answer = await self._models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=name, lora_path=f"lorelei://{name}")
        )
        if isinstance(answer, ErrorResponse):
            raise Refused(answer.error.code, answer.error.message)

    async def installed(self, name: str) -> Message:
        """What all workers hold under a name; a worker that differs is named."""
        digests = [a["digest"] for a in await self.ask_workers("lorelei_digest", name)]
        odd = [digest for digest in digests if digest != digests[0]]
        return {"digest": odd[0] if odd else digests[0], "workers": len(digests)}

    async def remove(self, name: str) -> None:
        request = self.adapters.get(name)
        if request is not None:
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
            await self.engine.remove_lora(request.lora_int_id)
        await self.ask_workers("lorelei_forget", name)


def _refuse(answers: list[Message]) -> None:
    for answer in answers:
        if "refused" in answer:
            raise Refused(422, answer["refused"])


def _check_token(scope: Message) -> None:
    expected = os.environ.get(TOKEN)
    if not expected:
        host = scope["app"].state.args.host
        if host not in ("127.0.0.1", "localhost", "::1"):
            raise Refused(403, f"bound to {host} without {TOKEN}; set it, here and at the trainer")
        return
    given = dict(scope["headers"]).get(b"authorization", b"")
    if not hmac.compare_digest(given, f"Bearer {expected}".encode()):
        raise Refused(403, f"the token differs from the server's {TOKEN}")
