"""Calls that are under way, on the caller's side: what is to be done when the answer comes, or cannot come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection
from concurrent.futures import Future, InvalidStateError
from typing import Any

from slurmfork.engine import wire
from slurmfork.engine.codec import unpack, unpack_pickle
from slurmfork.engine.failures import unpack_failure
from slurmfork.engine.inbox import Arrived
from slurmfork.errors import CodecError, Unreachable

Sink = Callable[[Any, "Exception | None", bool], None]  # the next item of a stream, or its error, or its end


class Lost(Unreachable):
    """The connection was gone before a call was sent."""


class CallFuture(Future[Any]):
    """The result of a call that is under way; ``cancel`` tells the engine, too."""

    def __init__(self, number: int, give_up: Callable[[int], None]) -> None:
        super().__init__()
        self._give_up = give_up
        self._number = number

    def cancel(self) -> bool:
        """Give up: an async method is cancelled, a sync one is told, and its result dropped."""
        done = super().cancel()
        if done:
            self._give_up(self._number)
        return done


class Pending:
    __slots__ = ("frame", "future", "packages", "sink", "timer", "worker")

    def __init__(
        self, worker: str, packages: Collection[str], future: CallFuture | None = None, sink: Sink | None = None
    ) -> None:
        self.worker = worker
        self.packages = packages
        self.future = future
        self.sink = sink
        self.frame: wire.Frame | None = None
        self.timer: asyncio.TimerHandle | None = None

    def fail(self, error: Exception) -> None:
        if self.sink is not None:
            self.sink(None, error, True)
        elif self.future is not None:
            with contextlib.suppress(InvalidStateError):
                self.future.set_exception(error)


def failure_of(arrived: Arrived, pending: Pending) -> Exception:
    """Why a call failed."""
    try:
        return unpack_failure(arrived.body, arrived.buffers, pending.packages, pending.worker)
    except (CodecError, ValueError) as error:
        return CodecError(f"why the call failed cannot be read: {error}")


def value_of(message: wire.Result | wire.Item, arrived: Arrived, packages: Collection[str]) -> Any:
    """What a call has returned, or yielded; raises CodecError."""
    if message.pickled:
        return unpack_pickle(arrived.body, arrived.buffers)
    return unpack(arrived.body, arrived.buffers, packages)
