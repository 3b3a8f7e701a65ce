"""The canary: whether a rollout engine serves what the trainer published."""

from __future__ import annotations

from pydantic import Field

from lorelei.config.section import Section


class CanaryConfig(Section):
    """Compares the log-probabilities of fixed tokens after every publication."""

    enabled: bool = Field(
        default=True, description="Stop when the rollout engine serves another adapter."
    )
    tokens: int | None = Field(
        default=None,
        ge=8,
        description="Tokens compared for each adapter. Default: 64, and 512 with a dtype other "
        "than float32, whose rounding hides small updates.",
    )


class WithCanary(Section):
    """What every publisher's section has."""

    canary: CanaryConfig = Field(
        default_factory=CanaryConfig, description="Checks what the rollout engine serves."
    )
