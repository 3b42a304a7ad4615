"""A handle on one worker that hosts an engine: calls, streams, futures, and engines made by name."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

from slurmfork.engine import loss, wire
from slurmfork.engine.background import background
from slurmfork.engine.caller import Connection
from slurmfork.engine.codec import Packed, pack, pack_pickle
from slurmfork.engine.failures import worker_failed
from slurmfork.engine.pending import Lost
from slurmfork.engine.pool import connected
from slurmfork.engine.source import Source
from slurmfork.engine.streams import WINDOW, AsyncStream, Stream
from slurmfork.errors import EngineError, Unreachable, UsageError
from slurmfork.messages import WorkerView
from slurmfork.names import OVER_STATES, UP_STATES

T = TypeVar("T")
Codec = Literal["pickle"] | None

_LOOK_PAUSE_S = 0.1


class Worker:
    """One worker of a role that hosts an engine. Handles are cheap, and may be used by any number of threads."""

    def __init__(self, source: Source, view: WorkerView, packages: frozenset[str]) -> None:
        self.name = view.worker
        self.role = view.role
        self.index = view.index
        self._source = source
        self._view = view
        self._packages = packages
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<worker {self.name} of run {self._source.run_id}>"

    @property
    def view(self) -> WorkerView:
        """The worker as the head showed it when it was last asked: its node, PID, devices, ports, state."""
        return self._view

    # --- calls

    def call(
        self,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """Call a method and return its result."""
        future = self.submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)
        return result(future)

    async def acall(
        self,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """The same for a program with an event loop; cancelling it cancels the call."""
        await self._connect_first()
        return await asyncio.wrap_future(
            self.submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)
        )

    def submit(
        self,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Future[Any]:
        """Begin a call; its future. What was passed may be changed as soon as this returns."""
        return self._submit(method, packed(args, kwargs, codec), engine, seconds(timeout), codec)

    def _submit(self, method: str, value: Packed, engine: str, timeout: float | None, codec: Codec) -> Future[Any]:
        _names(method=method, engine=engine)

        def make(number: int, received: list[int]) -> wire.Message:
            return wire.Call(number, self.name, engine, method, codec is not None, 0, received)

        return self._request(make, value, timeout)

    def _request(
        self, make: Callable[[int, list[int]], wire.Message], value: Packed, timeout: float | None
    ) -> Future[Any]:
        return self._on_connection(
            lambda connection: connection.request(self.name, make, value, self._packages, timeout=timeout)
        )

    # --- streams

    def stream(self, method: str, *args: Any, engine: str = "", codec: Codec = None, **kwargs: Any) -> Stream:
        """Iterate over what a generator method yields, sync or async, as it comes.

        The engine is at most 32 items ahead. Between two items of a sync generator other calls may run.
        """
        return Stream(partial(self._begin_stream, method, packed(args, kwargs, codec), engine, codec))

    def astream(self, method: str, *args: Any, engine: str = "", codec: Codec = None, **kwargs: Any) -> AsyncStream:
        """The same for ``async for``."""
        return AsyncStream(partial(self._begin_stream, method, packed(args, kwargs, codec), engine, codec))

    def _begin_stream(
        self, method: str, value: Packed, engine: str, codec: Codec, sink: Callable[..., None]
    ) -> tuple[Callable[[int], None], Callable[[], None]]:
        _names(method=method, engine=engine)

        def make(number: int, received: list[int]) -> wire.Message:
            return wire.Call(number, self.name, engine, method, codec is not None, WINDOW, received)

        def begin(connection: Connection) -> tuple[Callable[[int], None], Callable[[], None]]:
            number = connection.stream(self.name, make, value, self._packages, sink)
            return partial(connection.more, number), partial(connection.give_up_soon, number)

        return self._on_connection(begin)

    # --- engines

    def create_engine(self, name: str, path: str, *args: Any, **kwargs: Any) -> None:
        """Make another object of ``package.module:Class`` in the worker's process, with a thread of its own."""
        result(self._create(name, path, packed(args, kwargs, None)))

    async def acreate_engine(self, name: str, path: str, *args: Any, **kwargs: Any) -> None:
        """The same for a program with an event loop."""
        await self._connect_first()
        await asyncio.wrap_future(self._create(name, path, packed(args, kwargs, None)))

    def _create(self, name: str, path: str, value: Packed) -> Future[Any]:
        _names(name=name, path=path)
        if not name:
            raise UsageError("an engine needs a name; the one without is the worker's own")
        if not all(path.partition(":")):
            raise UsageError(f"{path!r} names no class; write package.module:Class")
        return self._request(lambda number, _: wire.Create(number, self.name, name, path, False), value, None)

    def remove_engine(self, name: str) -> None:
        """Have an engine close itself, and forget it; raises EngineNotFound."""
        result(self._remove(name))

    def _remove(self, name: str) -> Future[Any]:
        _names(name=name)
        return self._request(lambda number, _: wire.Remove(number, self.name, name), wire.NOTHING, None)

    def health(self, timeout: float | None = 10.0) -> dict[str, Any]:
        """``worker``, ``pid``, and of each engine ``worker``, ``engine``, ``class``, the sync ``method`` that runs.

        And for how many ``seconds`` it does, and how many calls are ``waiting``: it is the process that answers, at
        once, while a method may hang.
        """
        health: dict[str, Any] = result(self._request(lambda number, _: wire.Ask(number), wire.NOTHING, timeout))
        return {**health, "pid": self._view.pid or health["pid"]}  # the node's, where the host has one of its own

    # --- connection

    def _on_connection(self, use: Callable[[Connection], T]) -> T:
        """Use a connection, another one if the first turns out to be lost before anything was sent."""
        connection = self._connection
        if connection is None or connection.lost:
            connection = self._connect()
        try:
            return use(connection)
        except Lost:
            return use(self._connect())

    async def _connect_first(self) -> None:
        """Connect, without holding up the caller's event loop while the head is asked."""
        if self._connection is None or self._connection.lost:
            await asyncio.get_running_loop().run_in_executor(None, self._connect)

    def _connect(self) -> Connection:
        with self._lock:
            if self._connection is not None and not self._connection.lost:
                return self._connection
            if self._connection is not None:
                self._view = self._look()
            until = time.monotonic() + loss.PATIENCE_S
            while True:
                try:
                    made = self._connection = background().run(connected(self._source, self._view))
                    return made
                except Unreachable:
                    if time.monotonic() >= until:
                        raise
                time.sleep(_LOOK_PAUSE_S)  # it has ended, perhaps, and the head is about to hear of it
                self._view = self._look()

    def _look(self) -> WorkerView:
        """The worker as it stands now; raises WorkerFailed, or EngineError where it is not up yet."""
        views = self._source.engine_views(self.role)
        view = next((view for view in views if view.worker == self.name), None)
        if view is None:
            raise EngineError(f"{self.name} is gone: its role was started again, or stopped")
        return up(view)


def packed(args: Sequence[Any], kwargs: dict[str, Any], codec: Codec) -> Packed:
    if codec not in (None, "pickle"):
        raise UsageError(f"codec is None or 'pickle', not {codec!r}")
    return (pack_pickle if codec else pack)([list(args), kwargs])


def _names(**words: object) -> None:
    for what, word in words.items():
        if not isinstance(word, str):
            raise UsageError(f"{what} is a word, in quotes, not {word!r}")


def seconds(timeout: float | None) -> float | None:
    """A time limit as it may be; raises UsageError."""
    if timeout is not None and (not isinstance(timeout, (int, float)) or not timeout > 0):
        raise UsageError(f"timeout is a number of seconds above 0, or None, not {timeout!r}")
    return timeout


def up(view: WorkerView) -> WorkerView:
    if view.state in OVER_STATES:
        raise worker_failed(view)
    if view.state not in UP_STATES:
        raise EngineError(f"{view.worker} is {view.state}: run.wait('ready') waits for it")
    if not view.endpoints:
        raise UsageError(f"{view.worker} hosts no engine: its role has a `command`, not an `engine`")
    return view


def result(future: Future[Any]) -> Any:
    background().refuse()
    try:
        return future.result()
    except BaseException:
        future.cancel()  # on Ctrl-C, too, nobody waits for it any more
        raise
