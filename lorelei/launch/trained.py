"""A run's adapters put to use: evaluated, exported, talked to. Reads the run, never writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorelei.config.run import RunConfig
from lorelei.inference.embedded.engine import EmbeddedEngine
from lorelei.launch.assemble import build, decoder_of, evaluators
from lorelei.lora.peft_folder import write_peft_folder
from lorelei.lora.state import AdapterState
from lorelei.model.backend import DTYPES, default_device
from lorelei.model.config import ForeignModel
from lorelei.model.load import load_decoder, read_config
from lorelei.model.locate import cache_folder, resolve_model
from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
from lorelei.run_file import validate
from lorelei.store.identity import read_identity
from lorelei.store.manifest import Manifest, read_checkpoints
from lorelei.store.model_folder import write_model_folder
from lorelei.store.snapshot import read_snapshot
from lorelei.types import AdapterRef, GenerateRequest, Prompt, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """The newest checkpoint of a run that verifies."""

    folder: Path
    config: RunConfig
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> TrainedRun:
        """Raises ValueError when no checkpoint verifies."""
        identity = read_identity(folder)
        found = read_checkpoints(folder, identity.run_id)
        if not found.verified:
            raise ValueError(f"{folder}: it has no checkpoint that verifies; see `lorelei check`")
        config = validate(dict(identity.config))
        return cls(folder=folder, config=config, manifest=found.verified[-1])

    def adapter(self, name: str | None) -> str:
        """The adapter of that name, or the only one. Raises ValueError naming the others."""
        there = list(self.manifest.adapters)
        if name is None and len(there) == 1:
            return there[0]
        if name not in there:
            asked = "which one?" if name is None else f"there is no {name!r};"
            raise ValueError(f"adapter: {asked} use --adapter with one of: {', '.join(there)}")
        return name

    def state(self, name: str) -> AdapterState:
        """The adapter's tensors."""
        path = self.manifest.adapters[name].snapshot
        return read_snapshot(self.folder / path, self.manifest.files[path].sha256).state

    def ref(self, name: str, state: AdapterState) -> AdapterRef:
        """The adapter's version under a name for this process."""
        return AdapterRef(
            name=name,
            version=self.manifest.adapters[name].record.version,
            run_id=self.manifest.run,
            digest=state.digest(),
        )


def export(folder: Path, name: str | None, out: Path | None) -> Path:
    """Write an adapter in PEFT's format, full weights as a checkpoint. Returns the folder."""
    run = TrainedRun.read(folder)
    name = run.adapter(name)
    out = out or folder / "export" / f"{name}-v{run.manifest.adapters[name].record.version}"
    state = run.state(name)
    if state.spec.full:
        base = resolve_model(run.config.model)
        write_model_folder(out, state, base, read_config(base))
    else:
        write_peft_folder(out, state, run.config.model)
    return out


def evaluate(
    folder: Path, n_prompts: int | None, base: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """{adapter: {"base" (if asked) and version: held-out means}}, on the run's own problems."""
    run = TrainedRun.read(folder)
    if not any(e.eval.every for e in run.config.experiments()):
        raise ValueError("eval.every: 0 in every adapter: the run holds no problems out")
    return asyncio.run(_evaluate(run, n_prompts, base))


async def _evaluate(
    run: TrainedRun, n_prompts: int | None, base: bool
) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    async with AsyncExitStack() as stack:
        logs = cache_folder() / "logs" / run.folder.name
        parts = await build(run.config, stack, logs, training=False)
        for name, evaluator in evaluators(run.config, parts).items():
            if n_prompts is not None:
                evaluator = replace(evaluator, prompts=_first(evaluator.prompts, n_prompts))
            state = run.state(name)
            ref = run.ref(name, state)
            await parts.sampler.engine.load(ref, state)
            found[name] = {"base": (await evaluator.run(None)).means} if base else {}
            found[name][f"v{ref.version}"] = (await evaluator.run(ref)).means
    return found


def _first(prompts: Sequence[Prompt], n: int) -> Sequence[Prompt]:
    if n > len(prompts):
        raise ValueError(f"-n: {n} is more than the {len(prompts)} problems that are held out")
    return prompts[:n]


class Chat:
    """A conversation with an adapter, or with its base model."""

    def __init__(
        self, folder: Path, name: str | None, base: bool, sampling: SamplingParams
    ) -> None:
        run = TrainedRun.read(folder)
        self._folder, self._model = folder, resolve_model(run.config.model)
        self._tokenizer = load_tokenizer(self._model)
        self._dtype = DTYPES[run.config.dtype]
        self._name = run.adapter(name)
        self._state = run.state(self._name)
        self._ref = None if base else run.ref(self._name, self._state)
        stops = stop_token_ids(self._model, self._tokenizer)
        self._sampling = replace(sampling, stop_token_ids=stops)

    @property
    def who(self) -> str:
        """Who answers."""
        return "the base model" if self._ref is None else str(self._ref)

    def answers(self, questions: Iterator[str]) -> Iterator[str]:
        """One answer for each question; the model sees the whole conversation."""
        try:
            decoder = load_decoder(self._model, self._dtype, default_device())
        except ForeignModel as error:
            raise ValueError(
                f"{self._folder}: its model is none that `lorelei chat` builds; use `lorelei "
                f"export {self._folder}` and talk to the adapter through vLLM, SGLang or peft"
            ) from error
        with asyncio.Runner() as runner:
            engine = EmbeddedEngine(decoder, tokenizer=self._tokenizer)
            try:
                if self._ref is not None:
                    runner.run(engine.load(self._ref, self._state))
                messages: list[Mapping[str, str]] = []
                for number, question in enumerate(questions):
                    messages.append({"role": "user", "content": question})
                    request = self._request(messages, number)
                    completion = runner.run(engine.generate(request))
                    text = decoder_of(self._tokenizer)(completion.tokens)
                    messages.append({"role": "assistant", "content": text})
                    yield text
            finally:
                runner.run(engine.close())

    def _request(self, messages: list[Mapping[str, str]], number: int) -> GenerateRequest:
        text = self._tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, tokenize=False
        )
        tokens = self._tokenizer(str(text), add_special_tokens=False)["input_ids"]
        return GenerateRequest(
            tokens=np.asarray(tokens, dtype=np.int32),
            adapter=self._ref,
            sampling=self._sampling,
            key=f"chat/{number}",
        )
