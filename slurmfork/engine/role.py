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
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from slurmfork.engine.futures import gathered
from slurmfork.engine.handle import Codec, Worker, packed, result, seconds, up
from slurmfork.engine.source import Source
from slurmfork.errors import UsageError
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.spec.model import Spec


class Role:
    """All workers of a role that hosts engines."""

    def __init__(
        self,
        source: Source,
        name: str,
        packages: frozenset[str] = frozenset(),
        spec: Spec | None = None,
        views: Sequence[WorkerView] | None = None,
    ) -> None:
        self.name = name
        views = source.engine_views(name) if views is None else views
        if not views:
            hint = _hint(spec, name) if spec is not None else ""
            raise UsageError(f"run {source.run_id} has no worker of a role {name!r}{hint}")
        there = [view for view in views if view.state is not WorkerState.STOPPED] or views
        self.workers = [Worker(source, up(view), packages) for view in sorted(there, key=lambda view: view.index)]
        self._source = source

    def __repr__(self) -> str:
        return f"<role {self.name} of run {self._source.run_id}, {len(self.workers)} workers>"

    def worker(self, index: int) -> Worker:
        """One of them; raises UsageError."""
        found = next((worker for worker in self.workers if worker.index == index), None)
        if found is None:
            raise UsageError(f"{self.name} has {len(self.workers)} workers, from 0; there is no {index!r}")
        return found

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
        results: list[Any] = result(self.submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs))
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
        value, timeout = packed(args, kwargs, codec), seconds(timeout)
        return gathered([worker._submit(method, value, engine, timeout, codec) for worker in self.workers])

    def scatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> list[Any]:
        """Call a method on all workers, each with its own of ``arguments``: a tuple of them, or a single one.

        Keywords are the same for all.
        """
        begun = self.submit_scatter(method, arguments, engine=engine, timeout=timeout, codec=codec, **kwargs)
        results: list[Any] = result(begun)
        return results

    async def ascatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> list[Any]:
        """The same for a program with an event loop."""
        await self._connect()
        return await asyncio.wrap_future(
            self.submit_scatter(method, arguments, engine=engine, timeout=timeout, codec=codec, **kwargs)
        )

    def submit_scatter(
        self,
        method: str,
        arguments: Sequence[Any],
        *,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Future[list[Any]]:
        """Begin the same; a future of the results."""
        if len(arguments) != len(self.workers):
            raise UsageError(f"{self.name} has {len(self.workers)} workers, and there are {len(arguments)} arguments")
        timeout = seconds(timeout)
        values = [packed(one if isinstance(one, tuple) else (one,), kwargs, codec) for one in arguments]
        pairs = zip(self.workers, values, strict=True)
        return gathered([worker._submit(method, value, engine, timeout, codec) for worker, value in pairs])

    def create_engine(self, name: str, path: str, *args: Any, **kwargs: Any) -> None:
        """Make another object of ``package.module:Class`` in each worker's process; calls name it by ``engine``."""
        value = packed(args, kwargs, None)
        result(gathered([worker._create(name, path, value) for worker in self.workers]))

    def remove_engine(self, name: str) -> None:
        """Have each worker's engine of that name close itself, and forget it."""
        result(gathered([worker._remove(name) for worker in self.workers]))

    async def _connect(self) -> None:
        await asyncio.gather(*(worker._connect_first() for worker in self.workers))


def _hint(spec: Spec, name: str) -> str:
    """What may have been meant by a role that has no worker."""
    if name in spec.roles:
        return f": it is declared, and run.fork({name!r}) starts it"
    import difflib

    near = difflib.get_close_matches(name, spec.roles, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(spec.roles)}"


def packages_of(spec: Spec) -> frozenset[str]:
    """The packages whose dataclasses and exceptions may come back: those of the run's engines."""
    return frozenset(one.engine.partition(":")[0].partition(".")[0] for one in spec.roles.values() if one.engine)
