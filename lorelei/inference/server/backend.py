"""What differs between rollout servers: how one is started and what it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorelei.inference.server.client import Client
from lorelei.inference.server.process import LOOPBACK, Launch
from lorelei.lora.state import AdapterState
from lorelei.types import AdapterRef, FinishReason, Floats, GenerateRequest, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a running server says of itself."""

    model: str  # the folder or id it serves
    dtype: str
    context: int  # most tokens of a sequence
    max_rank: int  # of an adapter
    workers: int  # processes that hold the model: receivers of a broadcast
    device: str  # "cpu" or "cuda"
    stops_strings: bool  # whether it can watch for stop strings itself
    receives: bool  # whether adapters can come by broadcast


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a server answered to one request."""

    tokens: Ints  # [T]; the stop token, when there is one, is the last
    logprobs: Floats  # [T] nats, temperature-scaled
    finish_reason: FinishReason
    served_name: str | None  # of the adapter that sampled; none: the base model


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A server's counters."""

    tokens_generated: int  # since its start
    adapters: tuple[str, ...]  # served names


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A broadcast group: rank 0 sends, every worker of every server receives."""

    name: str  # never used twice
    host: str
    port: int  # of the TCPStore at which all meet
    size: int
    first_rank: int  # of this server's workers
    backend: str  # "gloo" or "nccl"
    timeout: float  # seconds for meeting and for each broadcast


class ServerBackend(Protocol):
    """One kind of server. Every call may raise what Client raises.

    Loading is idempotent: a version that is there already is a success.
    """

    @property
    def name(self) -> str:
        """As in `rollout.kind`."""
        ...

    @property
    def read_timeout(self) -> float:
        """Seconds without a byte of an answer to `generate` after which it counts as stuck."""
        ...

    def launch(
        self, number: int, port: int, token: str, folder: Path, host: str = LOOPBACK
    ) -> Launch:
        """How replica `number` is started at host:port; files of its own go to `folder`."""
        ...

    async def facts(self, client: Client) -> Facts:
        """What the server can do. Raises ServerTrouble until it is up.

        Raises ValueError for a server that lacks what Lorelei needs, naming how to start it.
        """
        ...

    async def warm_up(self, client: Client) -> None:
        """One real request: a server may call itself healthy and die of the first one."""
        ...

    async def generate(
        self, client: Client, request: GenerateRequest, limit: int, seed: int
    ) -> Sampled:
        """Sample at most `limit` tokens. Cancelling the call aborts the request."""
        ...

    async def score(
        self,
        client: Client,
        sequences: Sequence[Ints],
        adapter: AdapterRef | None,
        temperature: float,
    ) -> list[Floats]:
        """As InferenceEngine.score."""
        ...

    async def load_bytes(self, client: Client, ref: AdapterRef, state: AdapterState) -> str | None:
        """Send the tensors and install them. Returns the digest of what the workers hold."""
        ...

    async def load_folder(self, client: Client, ref: AdapterRef, folder: Path) -> str | None:
        """Install a PEFT folder that the server can read. Returns the digest, if it can tell."""
        ...

    async def join(self, client: Client, group: Group) -> None:
        """Accept to meet the others of a broadcast group; the meeting itself goes on after."""
        ...

    async def receive(self, client: Client, ref: AdapterRef, group: str, size: int) -> None:
        """Accept to receive `size` bytes of payload.pack; the broadcast itself goes on after."""
        ...

    async def load_received(self, client: Client, ref: AdapterRef) -> str | None:
        """Wait for the broadcast and install the version. Raises KeyError when none came."""
        ...

    async def leave(self, client: Client, group: str) -> None:
        """Give up a broadcast group and whatever is still awaited in it. Idempotent."""
        ...

    async def unload(self, client: Client, ref: AdapterRef) -> None:
        """Forget a version, its tensors included. Idempotent."""
        ...

    async def pause(self, client: Client) -> None:
        """Stop after the running step, keeping all requests."""
        ...

    async def resume(self, client: Client) -> None:
        """Go on."""
        ...

    async def abort(self, client: Client, adapter: AdapterRef | None = None) -> None:
        """End all requests, or those of one version; they return what they have with 'abort'."""
        ...

    async def sleep(self, client: Client) -> None:
        """Give back the accelerator's memory; nothing is running. On a CPU: only pause."""
        ...

    async def wake(self, client: Client) -> None:
        """Undo `sleep`."""
        ...

    async def status(self, client: Client) -> Status:
        """Its counters; cheap, never behind generation."""
        ...
