"""Runs inside vLLM's API server: what it does for the routes under /lorelei."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from starlette.datastructures import State
from starlette.types import ASGIApp
from vllm import SamplingParams
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.inputs import TokensPrompt
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from lorelei.inference.server.routes import Json, Middleware, Refused

POLL = 0.005  # seconds between two questions whether an adapter is prepared


class Routes(Middleware):
    """What vLLM's option --middleware names."""

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(app, VllmServer)


class VllmServer:
    """Implements routes.Server on the objects of vLLM's API server."""

    def __init__(self, state: State) -> None:
        self.host: str = state.args.host
        self._engine = state.engine_client
        self._models = state.openai_serving_models
        self._finished_tokens = 0
        self._sampling: set[str] = set()  # ids of running requests of `generate`

    # --- sampling

    async def generate(self, asked: Json) -> Json:
        stops = asked["stop_strings"] if self._engine.renderer.tokenizer is not None else []
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
            whole = await self._run(name, asked["tokens"], params, asked["adapter"])
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

    async def score(self, asked: Json) -> Json:
        params = SamplingParams(
            temperature=asked["temperature"],
            max_tokens=1,
            prompt_logprobs=0,
            seed=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

        async def one(tokens: list[int]) -> list[float]:
            output = await self._run(uuid4().hex, tokens, params, asked["adapter"])
            entries = (output.prompt_logprobs or [])[1:]
            return [e[t].logprob for e, t in zip(entries, tokens[1:], strict=True)]

        return {"logprobs": await asyncio.gather(*map(one, asked["sequences"]))}

    async def _run(
        self, name: str, tokens: list[int], params: SamplingParams, adapter: str | None
    ) -> RequestOutput:
        """The whole output of one request. Aborted when cancelled."""
        if adapter is not None and adapter not in self._adapters:
            raise Refused(404, f"adapter {adapter} is not loaded")
        request = self._adapters[adapter] if adapter is not None else None
        last: RequestOutput | None = None
        stream = self._engine.generate(
            TokensPrompt(prompt_token_ids=tokens), params, name, lora_request=request
        )
        async for output in stream:
            last = output
        if last is None:
            raise Refused(500, "no output")
        return last

    # --- adapters

    async def load(self, asked: Json) -> Json:
        name = asked["name"]
        if name not in self._adapters:
            await self._on_workers("lorelei_load", name, asked["kind"], asked["body"])
            await self._prepared(name)
            answer = await self._models.load_lora_adapter(
                LoadLoRAAdapterRequest(lora_name=name, lora_path=f"lorelei://{name}")
            )
            if isinstance(answer, ErrorResponse):
                raise Refused(answer.error.code, answer.error.message)
        digests = [a["digest"] for a in await self._on_workers("lorelei_digest", name)]
        # a worker that differs is named
        return {"digest": next((d for d in digests if d != digests[0]), digests[0])}

    async def _prepared(self, name: str) -> None:
        """Wait until the workers have prepared an adapter. Raises Refused."""
        answers = await self._on_workers("lorelei_prepared", name)
        while any("waiting" in answer for answer in answers):
            await asyncio.sleep(POLL)
            answers = await self._on_workers("lorelei_prepared", name)
        for answer in answers:
            if "missing" in answer:
                raise Refused(404, f"{name}: nothing has come: {answer['missing']}")

    async def join(self, asked: Json) -> Json:
        await self._on_workers("lorelei_join", asked)
        return {}

    async def receive(self, asked: Json) -> Json:
        await self._on_workers("lorelei_receive", asked["name"], asked["group"], asked["size"])
        return {}

    async def leave(self, asked: Json) -> Json:
        await self._on_workers("lorelei_leave", asked["group"])
        return {}

    async def unload(self, asked: Json) -> Json:
        name = asked["name"]
        if (request := self._adapters.get(name)) is not None:
            await self._models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
            await self._engine.remove_lora(request.lora_int_id)
        await self._on_workers("lorelei_forget", name)
        return {}

    async def _on_workers(self, method: str, *args: Any) -> list[Json]:
        """What a method of the extension returns on each worker. Raises Refused."""
        answers = await self._engine.collective_rpc(method, args=args)
        for answer in answers:
            if "refused" in answer:
                raise Refused(422, answer["refused"])
        return answers

    # --- control

    async def pause(self, asked: Json) -> Json:
        await self._engine.pause_generation(mode="keep", clear_cache=False)
        return {}

    async def resume(self, asked: Json) -> Json:
        await self._engine.resume_generation()
        return {}

    async def abort(self, asked: Json) -> Json:
        name = asked["adapter"]
        meant = [k for k, r in self._requests.items() if name in (None, r.lora_name)]
        await self._engine.abort(meant, internal=True)
        return {}

    async def sleep(self, asked: Json) -> Json:
        if current_platform.is_cpu():
            await self._engine.pause_generation(mode="keep", clear_cache=True)
        else:
            await self._engine.sleep(level=1, mode="abort")
        return {}

    async def wake(self, asked: Json) -> Json:
        if current_platform.is_cpu():
            await self._engine.resume_generation()
        else:
            await self._engine.wake_up()
        return {}

    async def status(self, asked: Json) -> Json:
        await self._engine.check_health()
        running = sum(
            state.detokenizer.num_output_tokens()
            for state in self._requests.values()
            if state.external_req_id in self._sampling
        )
        return {"tokens": self._finished_tokens + running, "adapters": sorted(self._adapters)}

    async def facts(self, asked: Json) -> Json:
        workers = await self._on_workers("lorelei_facts")
        return {
            "logprobs_mode": self._engine.vllm_config.model_config.logprobs_mode,
            "workers": len(workers),
            "scores": all(worker["scores"] for worker in workers),
        }

    # --- vLLM's objects

    @property
    def _adapters(self) -> Mapping[str, Any]:
        return self._models.lora_requests

    @property
    def _requests(self) -> Mapping[str, Any]:
        return self._engine.output_processor.request_states
