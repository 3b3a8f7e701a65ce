"""export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lorelei.cli.arguments import AcceptChanged, AdapterName, RunFolder, prepare_run, say


class Experts(StrEnum):
    """How the adapters of a mixture's experts are written."""

    single = "single"
    fused = "fused"
    fused_018 = "fused-0.18"


def export(
    run: RunFolder,
    adapter: AdapterName = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export/NAME-vN.")] = None,
    experts: Annotated[
        Experts,
        typer.Option(
            help="A mixture's experts: single (vLLM, peft from 0.19 on), or fused for transformers "
            "5, as peft reads them from 0.19 on or before it (fused-0.18)."
        ),
    ] = Experts.single,
    accept_changed: AcceptChanged = None,
) -> None:
    """Write an adapter as a PEFT folder, which peft, vLLM and others read.

    A run with lora.use_lora: false is written as a checkpoint folder.
    """
    folder = prepare_run(run)
    from lorelei.cli.trained_run import TrainedRun
    from lorelei.lora.origin import ORIGIN, origin_bytes
    from lorelei.lora.peft_folder import write_peft_folder
    from lorelei.lora.peft_form import peft_form
    from lorelei.model.load import read_config
    from lorelei.model.locate import resolve_model
    from lorelei.store.model_folder import write_model_folder

    trained = TrainedRun.read(folder)
    name = trained.adapter(adapter)
    for warning in trained.check_inputs("export", ("model",), accept_changed):
        say(f"warning: {warning}", err=True)
    state = trained.state(name)
    out = out or folder / "export" / f"{name}-v{trained.manifest.adapters[name].record.version}"
    if state.spec.full:
        base = resolve_model(trained.config.model)
        write_model_folder(out, state, base, read_config(base))
    else:
        origin = trained.inputs.get("model")
        beside = {ORIGIN: origin_bytes(origin)} if origin else None
        fused, notes = peft_form(state, trained.config.model, experts)
        write_peft_folder(out, state, trained.config.model, fused, beside)
        for note in notes:
            say(f"warning: {note}", err=True)
    say(str(out))
