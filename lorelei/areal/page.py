"""docs/areal.md, made from the table. Run it from the repository root.

usage: python -m lorelei.areal.page [EXAMPLES_FOLDER COMMIT]

EXAMPLES_FOLDER: `examples` of a checkout of AReaL at COMMIT, whose outcomes are found anew; without
it those of the page are kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lorelei.areal.report import tables

PAGE = Path("docs/areal.md")
_MADE_APART = "<!-- from a checkout -->"
_EXAMPLES = f"""## AReaL's example files

Made from a checkout of AReaL by `python -m lorelei.areal.page EXAMPLES_FOLDER COMMIT`. The checkout
is the one that was at hand: at `cbff54d6`, which is newer, there are 71 files.

{_MADE_APART}
"""

_OPENING = """# AReaL's files

```bash
lorelei train gsm8k_grpo_lora.yaml                      # as it is
lorelei plan gsm8k_grpo_lora.yaml actor.path=./my_model # AReaL's keys can be overridden, and ours
lorelei convert gsm8k_grpo_lora.yaml -o run.yaml        # our YAML, which does the same
```

A file is known as AReaL's by its sections, whatever its name. Its interpolations (`${actor.path}`,
`${oc.env:NAME}`) are resolved, where the file says nothing with the defaults of AReaL's classes;
then every key is translated. The command prints what each one became, which of AReaL's defaults
count where the file says nothing, and what is not used and why. Every field of AReaL's option
classes has its rule below; a key that is none of them is an error that names the nearest one, and
`key=null` removes it; so is a value that cannot be done here. An override whose key is AReaL's is
set in the file before it is translated, so that what refers to it follows; any other is set in the
translation. Where two of them set the same, the last one counts.

Refused, with the field, the value and the fix: actor and rollout that disagree on `use_lora`;
servers with a largest rank below the adapter's, or with too few places for its versions; another
temperature, length or group size for the trainer than for the sampler; another reference, server
model or tokenizer than the actor's; `mbridge` with LoRA; backends that take more devices than the
cluster has, or whose `attn` and `ffn` take unlike numbers of processes; objectives that are not
built yet, by name; fp8; data with images.

**Full fine-tuning.** Most of AReaL's files train all weights. `actor.use_lora=true
rollout.use_lora=true` runs them with LoRA (with Megatron, `actor.megatron.bridge_type=
megatron-bridge` too); the refusal gives the line. All weights are trained here in float32 by archon
or fsdp, with the embedded sampler.

**Supervised fine-tuning.** A file whose `train_dataset.type` is `sft` becomes a job of kind `sft`:
nothing is sampled, and the sections of servers are not read. Rows are rendered as chats with the
model's template; AReaL's reader of gsm8k joins question and answer as they are.

What AReaL's files leave to Python code is asked for: the task and the reward of any data set but
`openai/gsm8k` (`task=...`, `reward=...`), and environments and agents (`env=...`), whose settings
examples keep in sections of classes of their own (`workflow`, `econfig`, `tir`, ...). The number of
steps follows from that data set's {rows} rows; of other data, give `steps=...`.

Unlike there: the reference policy is the base model with the adapter off, and not a second model;
adapters are saved every step, and resumed with every engine; publishing does not pause generation;
the canary stops a run whose servers sample anything but the published adapter.

## Advantages

What a value means there, it means here:

- `adv_norm` is applied to tokens: a rollout counts in its means and deviations as often as it has
  sampled tokens (`weigh_by: token`). With long wrong answers the sign of an advantage can depend
  on it. `reward_norm` counts rollouts.
- Deviations divide by the number less one (`std_unbiased: true`), have 1e-5 added (`eps`), and are
  taken around the mean that is subtracted (`std_around: subtracted_mean`, where it is another).
- `mean_leave1out` leaves out the value that the mean is subtracted from, or the token.
- `kl_ctl` above 0 subtracts the divergence from the rewards of tokens (`use_kl_in_reward: true`)
  with the file's `kl_estimator`, k1 where it says nothing, each token's within 10 of 0; the
  log-probabilities are the sampler's, or with `recompute_logprob` and without
  `use_decoupled_loss` the trainer's.
- `use_decoupled_loss` without `rejection_sampling` has no weight proximal / behaviour there: it
  becomes `recompute_logprob` alone.
- `reward_clip` clips rewards after bias and scaling.
- `rollout.agent.turn_discount` becomes `algo.turn_discount`: every turn is judged alone, with the
  score times the discount for every turn behind it.

## Objectives

`importance_sampling_level: sequence` is `algo.kind: gspo`, `use_sapo_loss` is `sapo`, and
`m2_threshold` with the decoupled loss is `m2po` ([objectives.md](objectives.md)). Else it is
`grpo`, whose `adv_norm` and `reward_norm` make Dr. GRPO, LitePPO, RLOO and REINFORCE of it as
there. Every token has the same weight, with every kind. M2PO's mask is found over the whole batch,
and tokens that it leaves out count in the normaliser; AReaL finds it in each micro-batch. The
overlong penalty is below `rollout.max_new_tokens`.

## Backends

`fsdp:d4`, `megatron:d4p1t1`, `megatron:(attn:d1p6t1c1|ffn:d1p6t1e1)`, `archon:d2`, `sglang:d4`,
`vllm:d4p1t1`, and the older `allocation_mode: sglang:d4+fsdp:d4`. The letters are d data, p
pipeline, t tensor, c context and e expert; in brackets, experts are laid out apart from attention,
on the same processes. A server's d are replicas and its t is `tensor_parallel_size`.
"""


def page(examples: str) -> str:
    """The whole page. examples: its part about AReaL's files, see `outcomes.section`."""
    from lorelei.areal.data import GSM8K_ROWS

    parts = [_OPENING.replace("{rows}", f"{GSM8K_ROWS:,}")]
    for section, rows in tables():
        lines = [f"| {keys} | {outcome} | {note} |" for keys, outcome, note in rows]
        head = ["| AReaL's keys | becomes | how, or why not |", "| --- | --- | --- |"]
        parts.append("\n".join([f"## {section}", "", *head, *lines, ""]))
    parts.append(f"{_EXAMPLES}\n{examples}\n")
    return "\n".join(parts)


def kept() -> str:
    """The part about AReaL's files as the page has it."""
    return PAGE.read_text().partition(_MADE_APART)[2].strip()


def main(arguments: list[str]) -> None:
    """Write the page. Raises SystemExit for arguments that are none."""
    match arguments:
        case []:
            examples = kept()
        case [folder, commit]:
            from lorelei.areal.outcomes import outcomes, section

            examples = section(outcomes(Path(folder)), commit)
        case _:
            raise SystemExit("usage: python -m lorelei.areal.page [EXAMPLES_FOLDER COMMIT]")
    PAGE.write_text(page(examples))


if __name__ == "__main__":
    main(sys.argv[1:])
