"""Engines in workers, by name: made there, called, waited for, watched and removed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from slurmfork.engine.handle import Codec, up
from slurmfork.engine.handle import Worker as Handle
from slurmfork.engine.role import Role, packages_of
from slurmfork.errors import EngineError
from slurmfork.messages import CancelReply
from slurmfork.names import split_target
from slurmfork.run import Run
from slurmfork.scheduler.workers import Workers

ENVIRONMENT = "slurmfork.environment"  # the engine by which set_worker_env reaches a process
_BARE = "slurmfork.engine.bare:Bare"


class Engines(Workers):
    """The engines of a run's workers; a handle on each worker is kept, with its connection."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._packages = packages_of(self._spec)
        self._handles: dict[str, Handle] = {}
        self._lock = threading.Lock()

    def close(self) -> CancelReply:
        """End the run, and verify: ``survivors`` counts what is left. A run that is over is left as it is."""
        self._handles.clear()
        return super().close()

    def create_engine(self, worker: str, path: str, name: str, *args: Any, **kwargs: Any) -> None:
        """Make an object of ``package.module:Class`` in a worker's process, to be called by ``engine=name``.

        Raises what its making raised, with the remote traceback as the cause, ImportError included.
        """
        self._may_come_from(path, worker)
        self._handle(worker).create_engine(name, path, *args, **kwargs)

    async def async_create_engine(self, worker: str, path: str, name: str, *args: Any, **kwargs: Any) -> None:
        """The same for a program with an event loop, which may make those of many workers at the same time."""
        self._may_come_from(path, worker)
        handle = await asyncio.get_running_loop().run_in_executor(None, self._handle, worker)
        await handle.acreate_engine(name, path, *args, **kwargs)

    def _may_come_from(self, path: str, worker: str) -> None:
        """Results of a worker may hold what is of this class's package from now on."""
        with self._lock:
            self._packages |= {str(path).partition(":")[0].partition(".")[0]}
            self._handles.pop(worker, None)

    def remove_engine(self, worker: str, name: str) -> None:
        """Have an engine close itself, and forget it; raises EngineNotFound."""
        self._handle(worker).remove_engine(name)

    def call_engine(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """Call a method of a worker's engine (left out: its role's own) and return its result. It is sent once."""
        return self._handle(worker).call(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    async def async_call_engine(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Any:
        """The same for a program with an event loop; cancelling it cancels the call."""
        handle = await asyncio.get_running_loop().run_in_executor(None, self._handle, worker)
        return await handle.acall(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    def submit_call(
        self,
        worker: str,
        method: str,
        *args: Any,
        engine: str = "",
        timeout: float | None = None,
        codec: Codec = None,
        **kwargs: Any,
    ) -> Future[Any]:
        """Begin a call; its future, whose ``cancel`` reaches the engine."""
        return self._handle(worker).submit(method, *args, engine=engine, timeout=timeout, codec=codec, **kwargs)

    def role(self, role: str) -> Role:
        """All workers of a role as one: calls on all, scattered, awaited; streams of each of its ``workers``."""
        self.wait()
        return Role(self.run, role, self._packages, views=self._views_of(role))

    def set_worker_env(self, worker: str, env: Mapping[str, str]) -> None:
        """Set variables in the process of a worker that hosts engines, for the engines that are created after.

        What a process reads when it begins is given by ``env`` of ``create_workers``. A restart forgets it.
        """
        handle = self._handle(worker)
        with suppress(EngineError):
            handle.create_engine(ENVIRONMENT, _BARE)
        handle.call("set_environment", dict(env), engine=ENVIRONMENT)

    def health(self, worker: str, timeout: float | None = 10.0) -> dict[str, Any]:
        """What a worker's engines are doing, and since when; answered while a method runs, or hangs."""
        return self._handle(worker).health(timeout)

    def _handle(self, worker: str) -> Handle:
        found = self._handles.get(worker)
        if found is not None:
            return found
        self.wait()
        view = self._view(worker)
        with self._lock:
            handle = self._handles[worker] = Handle(self.run, up(view), self._packages)
        return handle

    def _forget(self, role: str) -> None:
        with self._lock:
            for worker in [name for name in self._handles if split_target(name)[0] == role]:
                del self._handles[worker]
