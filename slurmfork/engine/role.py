"""Handles: a role and its workers as a controller sees them, to call the methods of the engines that they host.

    rollout = run.role("rollout")
    rollout.call("generate", prompts)                 # on all workers; a list, in their order
    rollout.scatter("generate", [part for part in parts])
    rollout.worker(3).call("generate", prompts)       # on one
    await rollout.acall("generate", prompts)

Every call takes ``engine`` (a name given to ``create_engine``; left out: the worker's own), ``timeout`` in seconds and
``codec`` ("pickle", where the role allows it); all other keywords are the method's. Raises what the method raised, of
the same type where that can be found here, with the remote traceback as its cause, else EngineCallError; WorkerFailed
where the worker is gone; TimeoutError; EngineNotFound; CodecError for values that cannot be sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

from slurmfork.engine import wire
from slurmfork.engine.background import background
from slurmfork.engine.caller import LOSS_PATIENCE_S, Connection, Lost, Source
from slurmfork.engine.codec import Packed, pack, pack_pickle
from slurmfork.engine.failures import worker_failed
from slurmfork.engine.futures import gathered
from slurmfork.engine.streams import WINDOW, AsyncStream, Stream
from slurmfork.errors import EngineError, Unreachable, UsageError
from slurmfork.messages import WorkerView
from slurmfork.names import OVER_STATES, UP_STATES
from slurmfork.spec.model import Spec

T = TypeVar("T")
Codec = Literal["pickle"] | None

_LOOK_PAUSE_S = 0.1

_connections: dict[tuple[str, str, int | None], Connection] = {}  # by run, endpoint and PID; used in the background
_opening: dict[tuple[str, str, int | None], asyncio.Future[Connection]] = {}


async def _connected(source: Source, view: WorkerView) -> Connection:
    """The connection to a worker's host, which all handles of this process share; in the background loop."""
    key = (source.run_id, view.endpoints[0], view.pid)
    found = _connections.get(key)
    if found is not None and not found.lost:
        return found
    if key not in _opening:
        _opening[key] = asyncio.ensure_future(_open(key, source, view))
    return await asyncio.shield(_opening[key])


async def _open(key: tuple[str, str, int | None], source: Source, view: WorkerView) -> Connection:
    try:
        made = Connection(source, view)
        await made.open()
        _connections[key] = made
        return made
    finally:
        del _opening[key]


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
        return _result(future)

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
        return self._submit(method, _packed(args, kwargs, codec), engine, timeout, codec)

    def _submit(self, method: str, value: Packed, engine: str, timeout: float | None, codec: Codec) -> Future[Any]:
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
        return Stream(partial(self._begin_stream, method, _packed(args, kwargs, codec), engine, codec))

    def astream(self, method: str, *args: Any, engine: str = "", codec: Codec = None, **kwargs: Any) -> AsyncStream:
        """The same for ``async for``."""
        return AsyncStream(partial(self._begin_stream, method, _packed(args, kwargs, codec), engine, codec))

    def _begin_stream(
        self, method: str, value: Packed, engine: str, codec: Codec, sink: Callable[..., None]
    ) -> tuple[Callable[[int], None], Callable[[], None]]:
        def make(number: int, received: list[int]) -> wire.Message:
            return wire.Call(number, self.name, engine, method, codec is not None, WINDOW, received)

        def begin(connection: Connection) -> tuple[Callable[[int], None], Callable[[], None]]:
            number = connection.stream(self.name, make, value, self._packages, sink)
            return partial(connection.more, number), partial(connection.give_up, number)

        return self._on_connection(begin)

    # --- engines

    def create_engine(self, name: str, path: str, *args: Any, **kwargs: Any) -> None:
        """Make another object of ``package.module:Class`` in the worker's process, with a thread of its own."""
        _result(self._create(name, path, _packed(args, kwargs, None)))

    def _create(self, name: str, path: str, value: Packed) -> Future[Any]:
        if not name:
            raise UsageError("an engine needs a name; the one without is the worker's own")
        return self._request(lambda number, _: wire.Create(number, self.name, name, path, False), value, None)

    def remove_engine(self, name: str) -> None:
        """Have an engine close itself, and forget it; raises EngineNotFound."""
        _result(self._remove(name))

    def _remove(self, name: str) -> Future[Any]:
        return self._request(lambda number, _: wire.Remove(number, self.name, name), wire.NOTHING, None)

    def health(self, timeout: float | None = 10.0) -> dict[str, Any]:
        """``worker``, ``pid``, and of each engine ``worker``, ``engine``, ``class``, the sync ``method`` that runs.

        And for how many ``seconds`` it does, and how many calls are ``waiting``: it is the process that answers, at
        once, while a method may hang.
        """
        health: dict[str, Any] = _result(self._request(lambda number, _: wire.Ask(number), wire.NOTHING, timeout))
        return health

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
            until = time.monotonic() + LOSS_PATIENCE_S
            while True:
                try:
                    made = self._connection = background().run(_connected(self._source, self._view))
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
        return _up(view)


class Role:
    """All workers of a role that hosts engines."""

    def __init__(self, source: Source, name: str, packages: frozenset[str] = frozenset()) -> None:
        self.name = name
        views = source.engine_views(name)
        if not views:
            raise UsageError(f"run {source.run_id} has no worker of a role {name!r}")
        self.workers = [Worker(source, _up(view), packages) for view in sorted(views, key=lambda view: view.index)]
        self._source = source

    def __repr__(self) -> str:
        return f"<role {self.name} of run {self._source.run_id}, {len(self.workers)} workers>"

    def worker(self, index: int) -> Worker:
        """One of them; raises UsageError."""
        if not 0 <= index < len(self.workers):
            raise UsageError(f"{self.name} has {len(self.workers)} workers, from 0; there is no {index!r}")
        return self.workers[index]

    def call(
        self,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call a method on all workers at once; their results in order. The first failure is raised at once."""
        results: list[Any] = _result(self.submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs))
        return results

    async def acall(
        self,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> list[Any]:
        """The same for a program with an event loop."""
        await self._connect()
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
    ) -> Future[list[Any]]:
        """Begin the same; a future of the results."""
        value = _packed(args, kwargs, codec)
        return gathered([worker._submit(method, value, engine, timeout, codec) for worker in self.workers])

    def scatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
    ) -> list[Any]:
        """Call a method on all workers, each with its own of ``arguments``: a tuple of them, or a single one."""
        results: list[Any] = _result(
            self.submit_scatter(method, arguments, engine=engine, timeout=timeout, codec=codec)
        )
        return results

    async def ascatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
    ) -> list[Any]:
        """The same for a program with an event loop."""
        await self._connect()
        return await asyncio.wrap_future(
            self.submit_scatter(method, arguments, engine=engine, timeout=timeout, codec=codec)
        )

    def submit_scatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
    ) -> Future[list[Any]]:
        """Begin the same; a future of the results."""
        if len(arguments) != len(self.workers):
            raise UsageError(f"{self.name} has {len(self.workers)} workers, and there are {len(arguments)} arguments")
        values = [_packed(one if isinstance(one, tuple) else (one,), {}, codec) for one in arguments]
        pairs = zip(self.workers, values, strict=True)
        return gathered([worker._submit(method, value, engine, timeout, codec) for worker, value in pairs])

    def create_engine(self, name: str, path: str, *args: Any, **kwargs: Any) -> None:
        """Make another object of ``package.module:Class`` in each worker's process; calls name it by ``engine``."""
        value = _packed(args, kwargs, None)
        _result(gathered([worker._create(name, path, value) for worker in self.workers]))

    def remove_engine(self, name: str) -> None:
        """Have each worker's engine of that name close itself, and forget it."""
        _result(gathered([worker._remove(name) for worker in self.workers]))

    async def _connect(self) -> None:
        await asyncio.gather(*(worker._connect_first() for worker in self.workers))


def packages_of(spec: Spec) -> frozenset[str]:
    """The packages whose dataclasses and exceptions may come back: those of the run's engines."""
    return frozenset(one.engine.partition(":")[0].partition(".")[0] for one in spec.roles.values() if one.engine)


def _packed(args: Sequence[Any], kwargs: dict[str, Any], codec: Codec) -> Packed:
    if codec not in (None, "pickle"):
        raise UsageError(f"codec is None or 'pickle', not {codec!r}")
    return (pack_pickle if codec else pack)([list(args), kwargs])


def _up(view: WorkerView) -> WorkerView:
    if view.state in OVER_STATES:
        raise worker_failed(view)
    if view.state not in UP_STATES:
        raise EngineError(f"{view.worker} is {view.state}: run.wait('ready') waits for it")
    if not view.endpoints:
        raise UsageError(f"{view.worker} hosts no engine: its role has a `command`, not an `engine`")
    return view


def _result(future: Future[Any]) -> Any:
    background().refuse()
    try:
        return future.result()
    except BaseException:
        future.cancel()  # on Ctrl-C, too, nobody waits for it any more
        raise
