"""The decode thread as an event loop sees it: it enqueues commands and waits for futures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from lorelei.inference.contract import EngineClosed

T = TypeVar("T")


class Worker:
    """One thread that runs `step` while it returns True, and commands between the steps.

    When a step or a posted command raises, the thread ends and every future gets EngineClosed.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._loop: asyncio.AbstractEventLoop | None = None
        self._futures: set[asyncio.Future[Any]] = set()  # touched by the event loop only
        self._closed: EngineClosed | None = None  # touched by the event loop only
        # of futures, a value or an exception; touched by the thread only
        self._results: list[tuple[asyncio.Future[Any], Any]] = []
        self._commands: list[Callable[[], None]] = []
        self._stopping = False
        self._changed = threading.Condition()  # guards commands and stopping
        self._thread = threading.Thread(target=self._run, name="lorelei-decode", daemon=True)
        self._thread.start()

    # --- called by the event loop

    @property
    def alive(self) -> bool:
        return self._closed is None

    def future(self) -> asyncio.Future[Any]:
        """A future for `resolve`. Raises EngineClosed after the end."""
        if self._closed is not None:
            raise _copy(self._closed)
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = self._loop.create_future()
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the thread before its next step. After the end it is never run."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    async def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, run on the thread between two steps."""
        future = self.future()

        def command() -> None:
            try:
                self.resolve(future, work())
            except Exception as error:  # the border: what a call raises is its caller's
                self.resolve(future, error)

        self.post(command)
        return await future

    async def close(self) -> None:
        """End after the running step. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)
        self._close(EngineClosed("the engine was closed"))

    def _close(self, closed: EngineClosed) -> None:
        self._closed = self._closed or closed
        for future in list(self._futures):
            if not future.done():
                future.set_exception(_copy(self._closed))

    # --- called by the thread

    def resolve(self, future: asyncio.Future[Any], result: Any) -> None:
        """Deliver a value or an exception once the current commands and step are over."""
        self._results.append((future, result))

    def _run(self) -> None:
        try:
            busy = False
            while (commands := self._next(busy)) is not None:
                for command in commands:
                    command()
                busy = self._step()
                self._deliver()
        except Exception as error:  # the border: everybody who waits must hear of it
            closed = EngineClosed(f"the decode thread failed: {type(error).__name__}: {error}")
            closed.__cause__ = error
            self._call_loop(lambda: self._close(closed))

    def _next(self, busy: bool) -> list[Callable[[], None]] | None:
        """The commands that came since; waits for one unless busy. None: stop."""
        with self._changed:
            while not (busy or self._commands or self._stopping):
                self._changed.wait()
            commands, self._commands = self._commands, []
            return None if self._stopping else commands

    def _deliver(self) -> None:
        results, self._results = self._results, []

        def deliver() -> None:
            for future, result in results:
                if future.done():  # cancelled
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

        if results:
            self._call_loop(deliver)

    def _call_loop(self, callback: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(callback)


def _copy(closed: EngineClosed) -> EngineClosed:
    """A new exception for each one who waits: a traceback grows with every raise."""
    error = EngineClosed(str(closed))
    error.__cause__ = closed.__cause__
    return error
