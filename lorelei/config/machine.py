"""The machines that a run is planned for."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from lorelei.config.section import Section

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 1 << 20, "GIB": 1 << 30}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)", re.IGNORECASE)


class MachineConfig(Section):
    """What `lorelei plan` counts on; a run takes what is there."""

    nodes: int = Field(default=1, ge=1, description="Machines.")
    devices: int | None = Field(
        default=None, ge=1, description="Accelerators of each. Default: what this machine has."
    )
    memory: str | None = Field(
        default=None, description="Memory of each accelerator, such as 80GB or 79GiB."
    )

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, value: str | None) -> str | None:
        if value is not None:
            amount(value)
        return value

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory is None else amount(self.memory)


def amount(text: str) -> int:
    """Bytes of '80GB' (10^9) or '79GiB' (2^30). Raises ValueError."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise ValueError("write a number and a unit, such as 80GB or 79GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
