"""chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from lorelei.cli.arguments import AdapterName, RunFolder, prepare_run, say

if TYPE_CHECKING:
    from lorelei.cli.trained_run import TrainedRun
    from lorelei.types import AdapterRef, SamplingParams


def chat(
    run: RunFolder,
    adapter: AdapterName = None,
    base: Annotated[
        bool, typer.Option("--base", help="The base model, without the adapter.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
) -> None:
    """Talk to an adapter. One line is one message; an empty line or the end of input ends."""
    folder = prepare_run(run)
    from lorelei.cli.trained_run import TrainedRun
    from lorelei.types import SamplingParams

    trained = TrainedRun.read(folder)
    name = trained.adapter(adapter)
    ref = None if base else trained.ref(name, trained.state(name))
    say(f"{ref or 'the base model'} answers; an empty line ends")
    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    for answer in _answers(trained, ref, sampling):
        say(answer)


def _answers(
    trained: TrainedRun, ref: AdapterRef | None, sampling: SamplingParams
) -> Iterator[str]:
    """One answer for each line of standard input; the model sees the whole conversation."""
    import asyncio
    from dataclasses import replace

    from lorelei.data.chat import ChatTemplate
    from lorelei.inference.embedded.engine import EmbeddedEngine
    from lorelei.model.backend import DTYPES, default_device
    from lorelei.model.config import ForeignModel
    from lorelei.model.load import load_decoder
    from lorelei.model.locate import resolve_model
    from lorelei.model.tokenizer import load_tokenizer, stop_token_ids
    from lorelei.types import GenerateRequest

    model = resolve_model(trained.config.model)
    tokenizer = load_tokenizer(model)
    stops = stop_token_ids(model, tokenizer)
    template = ChatTemplate(tokenizer=tokenizer, stop_token_ids=stops)
    sampling = replace(sampling, stop_token_ids=stops)
    try:
        decoder = load_decoder(model, DTYPES[trained.config.dtype], default_device())
    except ForeignModel as error:
        raise ValueError(
            f"{trained.folder}: `lorelei chat` cannot build its model; use `lorelei "
            f"export {trained.folder}` and talk to the adapter through vLLM, SGLang or peft"
        ) from error
    with asyncio.Runner() as runner:
        engine = EmbeddedEngine(decoder, tokenizer=tokenizer)
        try:
            if ref is not None:
                runner.run(engine.load(ref, trained.state(ref.name)))
            messages: list[dict[str, str]] = []
            for number, question in enumerate(_lines()):
                messages.append({"role": "user", "content": question})
                request = GenerateRequest(
                    tokens=template.prompt(messages),
                    adapter=ref,
                    sampling=sampling,
                    key=f"chat/{number}",
                )
                completion = runner.run(engine.generate(request))
                text = tokenizer.decode(completion.tokens.tolist(), skip_special_tokens=True)
                messages.append({"role": "assistant", "content": str(text)})
                yield str(text)
        finally:
            runner.run(engine.close())


def _lines() -> Iterator[str]:
    """Lines of standard input until an empty one."""
    with suppress(EOFError):
        while (line := input("> " if sys.stdin.isatty() else "")).strip():
            yield line
