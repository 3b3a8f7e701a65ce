"""What rewards print: escaped, and no more of it than a limit."""

from __future__ import annotations

import os
import select
import sys
import threading

from lorelei.obs.screen import escaped


class Output:
    """A pipe that workers print to; its lines go to standard error. `close` is idempotent."""

    def __init__(self, limit_kib: int) -> None:
        """limit_kib: what is shown in all; the rest is read and dropped."""
        self._read, self.pipe = os.pipe()
        self._limit_kib, self._left = limit_kib, limit_kib * 1024
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._drain, name="reward output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Show what is left. The workers have ended."""
        if self._closing.is_set():
            return
        self._closing.set()
        os.close(self.pipe)
        self._thread.join(1.0)

    def _drain(self) -> None:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        line = b""
        while True:
            if not poll.poll(200):
                if self._closing.is_set():  # something still holds the other end
                    break
                continue
            chunk = os.read(self._read, 1 << 16)
            if not chunk:
                break
            if self._left <= 0:
                continue
            *lines, line = (line + chunk).split(b"\n")
            for one in lines:
                self._show(one)
            if len(line) > self._left:
                self._show(line)
                line = b""
        if line:
            self._show(line)
        os.close(self._read)

    def _show(self, line: bytes) -> None:
        if self._left <= 0:
            return
        text = escaped(line[: self._left].decode(errors="backslashreplace"), keep="\t")
        shown = f"reward: {text[: self._left]}\n"
        self._left -= len(shown)
        sys.stderr.write(shown)
        if self._left <= 0:
            sys.stderr.write(
                f"reward: it prints more than reward.output_kib: {self._limit_kib} KiB; the rest "
                "is dropped\n"
            )
