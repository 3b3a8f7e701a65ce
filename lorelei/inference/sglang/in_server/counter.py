"""A number that SGLang's scheduler raises and its HTTP process reads, without a message."""

from __future__ import annotations

import mmap
import os
import struct

PATH = "LORELEI_COUNTER"  # the environment variable that says where it is

_LAYOUT = struct.Struct("<q")


class Counter:
    """A shared 64-bit count with one writer."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)

    @property
    def value(self) -> int:
        return _LAYOUT.unpack(self._map)[0]

    def add(self, more: int) -> None:
        self._map[:] = _LAYOUT.pack(self.value + more)


def make_counter() -> None:
    """For this process and those that it starts; memory only, gone with them."""
    descriptor = os.memfd_create("lorelei-counter")
    os.truncate(descriptor, _LAYOUT.size)
    os.environ[PATH] = f"/proc/{os.getpid()}/fd/{descriptor}"


def counter() -> Counter:
    """The counter of this server."""
    return Counter(os.environ[PATH])


def install() -> None:
    """Count every token that a request of this scheduler is given."""
    from sglang.srt.managers.schedule_batch import Req

    tokens = counter()
    update = Req.update_finish_state

    def counted(self: Req, new_accepted_len: int = 1) -> None:
        if not self.finished():
            tokens.add(new_accepted_len)
        update(self, new_accepted_len)

    Req.update_finish_state = counted
