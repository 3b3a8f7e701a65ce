"""What both sides of a comparison run: the same prompts, lengths, adapter and optimizer."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA, LR = 16, 32, 2e-4
FILLER = "Read every line with care before you answer. "


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """One GRPO step. Every completion has exactly `new_tokens`: no stop token ends it early."""

    name: str
    prompts: int
    samples: int = 8
    filler: int = 0  # sentences put before the question, to make prompts long
    new_tokens: int = 64
    steps: int = 3  # of one turn, the first included, which warms up

    def messages(self, step: int) -> list[list[dict[str, str]]]:
        """The chat prompts of one step."""
        numbers = range(step * self.prompts, (step + 1) * self.prompts)
        return [
            [{"role": "user", "content": f"{FILLER * self.filler}What is {n % 90} + {n % 7}?"}]
            for n in numbers
        ]


STEP_CASES = {
    case.name: case
    for case in (
        StepCase(name="2x8", prompts=2),
        StepCase(name="4x8", prompts=4),
        StepCase(name="2x8-prompt512", prompts=2, filler=48),
        StepCase(name="2x8-new512", prompts=2, new_tokens=512, steps=2),
    )
}


def toy_reward(prompt: int, sample: int) -> float:
    """Differs within a group, so that every group has a gradient."""
    return float((prompt * 7 + sample * 3) % 5)
