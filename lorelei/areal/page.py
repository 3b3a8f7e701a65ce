"""docs/areal.md, made from the table. Run it from the repository root.

usage: python -m lorelei.areal.page
"""

from __future__ import annotations

from pathlib import Path

from lorelei.areal.report import tables

PAGE = Path("docs/areal.md")

_OPENING = """# AReaL's files

```bash
lorelei train gsm8k_grpo_lora.yaml                      # as it is
lorelei plan gsm8k_grpo_lora.yaml actor.path=./my_model # AReaL's keys can be overridden, and ours
lorelei convert gsm8k_grpo_lora.yaml -o run.yaml        # our YAML, which does the same
```

A file is known as AReaL's by its sections, whatever its name. Its interpolations (`${actor.path}`,
`${oc.env:NAME}`) are resolved, then every key is translated; the command prints what each one
became, which of AReaL's defaults count where the file says nothing, and what is not used and why.
A key that is none of AReaL's is an error that names the nearest one; so is a value that cannot be
done here. An override whose key is AReaL's is set in the file before it is translated, so that what
refers to it follows; any other is set in the translation. Where two of them set the same, the last
one counts.

Refused, with the field, the value and the fix: actor and rollout that disagree on `use_lora`;
servers with a largest rank below the adapter's, or with too few places for its versions; another
temperature, length or group size for the trainer than for the sampler; another reference, server
model or tokenizer than the actor's; `mbridge` with LoRA; backends that take more devices than the
cluster has, or whose `attn` and `ffn` take unlike numbers of processes; a reward that AReaL would
clip.

What AReaL's files leave to Python code is asked for: the task and the reward of any data set but
`openai/gsm8k` (`task=...`, `reward=...`), and environments and agents (`env=...`). The number of
steps follows from that data set's {rows} rows; of other data, give `steps=...`.

Unlike there: the reference policy is the base model with the adapter off, and not a second model;
adapters are saved every step, and resumed with every engine; publishing does not pause generation;
the canary stops a run whose servers sample anything but the published adapter.

## Backends

`fsdp:d4`, `megatron:d4p1t1`, `megatron:(attn:d1p6t1c1|ffn:d1p6t1e1)`, `archon:d2`, `sglang:d4`,
`vllm:d4p1t1`, and the older `allocation_mode: sglang:d4+fsdp:d4`. The letters are d data, p
pipeline, t tensor, c context and e expert; in brackets, experts are laid out apart from attention,
on the same processes. A server's d are replicas and its t is `tensor_parallel_size`.
"""


def page() -> str:
    """The whole page."""
    from lorelei.areal.data import GSM8K_ROWS

    parts = [_OPENING.replace("{rows}", f"{GSM8K_ROWS:,}")]
    for section, rows in tables():
        lines = [f"| {keys} | {outcome} | {note} |" for keys, outcome, note in rows]
        head = ["| AReaL's keys | becomes | how, or why not |", "| --- | --- | --- |"]
        parts.append("\n".join([f"## {section}", "", *head, *lines, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
