"""A hosted engine: one object, the one thread in which its sync methods run, and how each of its methods is called."""

from __future__ import annotations

import asyncio
import inspect
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import cached_property
from typing import Any

from slurmfork.engine import classes
from slurmfork.errors import EngineError, EngineNotFound

log = logging.getLogger(__name__)

CLOSERS = ("close", "destroy")


class Running:
    """A call that is under way. ``credit``: items of a stream that may still be sent before more is asked for."""

    __slots__ = ("cancelled", "credit", "id", "lock", "more", "task")

    def __init__(self, number: int, credit: int) -> None:
        self.id = number
        self.cancelled = False
        self.credit = credit
        self.task: asyncio.Task[None] | None = None
        self.more: Callable[[], None] | None = None  # goes on with a stream that waits for credit
        self.lock = threading.Lock()


current: ContextVar[Running | None] = ContextVar("current", default=None)


def cancelled() -> bool:
    """Whether the caller of the method that runs here has given up; a long sync method may look now and then."""
    running = current.get()
    return running is not None and running.cancelled


class Hosted:
    """One engine. ``create`` makes its object, in its thread, where all its sync methods run, one at a time."""

    def __init__(self, worker: str, name: str, path: str) -> None:
        self.worker = worker
        self.name = name
        self.path = path
        self.object: Any = None
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._methods: dict[str, tuple[Callable[..., Any], bool]] = {}
        self._busy: tuple[str, float] | None = None
        self._closed = False
        shown = f"{worker}:{name}" if name else worker
        threading.Thread(target=self._work, name=shown, daemon=True).start()

    @property
    def idle(self) -> bool:
        """Whether nothing waits for its thread."""
        return self._jobs.empty()

    def health(self) -> dict[str, Any]:
        """What it does: the sync method that runs, and for how many seconds; how many jobs wait."""
        busy = self._busy
        return {
            "worker": self.worker,
            "engine": self.name,
            "class": self.path,
            "method": busy[0] if busy else None,
            "seconds": round(time.monotonic() - busy[1], 3) if busy else 0.0,
            "waiting": self._jobs.qsize(),
        }

    def method(self, name: str) -> tuple[Callable[..., Any], bool]:
        """A method, and whether it is for the event loop; raises EngineNotFound."""
        found = self._methods.get(name)
        if found is None:
            method = self._attribute(name)
            if not callable(method):
                raise EngineNotFound(self._no_method(name))
            function = method if inspect.isroutine(method) else method.__call__
            loop = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
            found = self._methods[name] = (method, loop)
        return found

    def _attribute(self, name: str) -> Any:
        """What may be called by this name; a property would run here, which is not its thread."""
        if name.startswith("_") or isinstance(self._static(name), (property, cached_property)):
            return None
        return getattr(self.object, name, None)

    def _no_method(self, name: str) -> str:
        if name.startswith("_"):
            return f"{self.path} has no method {name!r} to be called: names that begin with _ are its own"
        if self._static(name) is not None:
            return f"{name!r} of {self.path} is no method: have one return it"
        import difflib

        there = [known for known in dir(self.object) if not known.startswith("_") and callable(self._static(known))]
        near = difflib.get_close_matches(name, there, 1)
        return f"{self.path} has no method {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")

    def _static(self, name: str) -> Any:
        return inspect.getattr_static(self.object, name, None)

    def do(self, job: Callable[[], None]) -> None:
        """Have its thread do something, in order."""
        self._jobs.put(job)

    def begin(self, what: str) -> None:
        """Its thread is at this method now."""
        self._busy = (what, time.monotonic())

    def end(self) -> None:
        """It is done with it."""
        self._busy = None

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:  # a job answers for itself; this thread must go on
                log.exception("fault in the thread of %s", self.worker)
            del job  # with all that came with the call, which may be large

    def in_thread(self, what: str, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """The result of ``work()``, done in its thread."""
        future: asyncio.Future[Any] = self._loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            elif isinstance(error, Exception) and not isinstance(error, StopIteration):
                future.set_exception(error)
            else:  # what no future may have, or would end the loop
                told = EngineError(f"{type(error).__name__}: {error}")
                told.__cause__ = error
                future.set_exception(told)

        def job() -> None:
            result, failure = None, None
            self.begin(what)
            try:
                result = work()
            except BaseException as error:
                failure = error
            finally:
                self.end()
            self._loop.call_soon_threadsafe(settle, result, failure)

        self.do(job)
        return future

    async def create(self, read: Callable[[], tuple[list[Any], dict[str, Any]]]) -> None:
        """Make the object; raises what its class does, ImportError among it."""

        def make() -> Any:
            arguments, keywords = read()
            return classes.load(self.path)(*arguments, **keywords)

        self.object = await self.in_thread("__init__", make)

    async def checkpoint(self) -> None:
        """Have the object save itself if it can, once what its thread is at is done."""
        saver = getattr(self.object, "checkpoint", None)
        if callable(saver):
            await self._call("checkpoint", saver)

    async def _call(self, what: str, method: Callable[[], Any]) -> None:
        done = method() if inspect.iscoroutinefunction(method) else await self.in_thread(what, method)
        if inspect.isawaitable(done):
            await done

    async def close(self) -> None:
        """Have the object close itself if it can, once what its thread is at is done; then end the thread."""
        if self._closed:
            return
        self._closed = True
        closer = next((found for name in CLOSERS if callable(found := getattr(self.object, name, None))), None)
        try:
            if closer is not None:
                await self._call("close", closer)
        finally:
            self._jobs.put(None)
            self.object = None
            self._methods.clear()


class Engines:
    """All engines of a process, by worker and name. ``home`` is the process's own worker."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.packages: set[str] = set()
        self.closing = False
        self._engines: dict[tuple[str, str], Hosted] = {}
        self._pickle: dict[str, bool] = {}

    def get(self, worker: str, name: str) -> Hosted:
        """An engine that is there; raises EngineNotFound."""
        found = self._engines.get((worker, name))
        if found is None or found.object is None:
            state = "is not made yet" if found is not None else "is not there"
            raise EngineNotFound(f"engine {name!r} of {worker} {state}" if name else f"the engine of {worker} {state}")
        return found

    def may_pickle(self, worker: str) -> bool:
        """Whether calls to a worker may carry pickled values."""
        return self._pickle.get(worker, False)

    async def create(
        self,
        worker: str,
        name: str,
        path: str,
        read: Callable[[], tuple[list[Any], dict[str, Any]]],
        *,
        pickle: bool = False,
    ) -> None:
        """Make an engine; raises EngineError where there is one of that name, else what its class raises."""
        if self.closing:
            raise EngineError(f"{self.home} is ending: no engine is made any more")
        if (worker, name) in self._engines:
            raise EngineError(
                f"{worker} has an engine {name!r} already" if name else f"{worker} has its engine already"
            )
        made = self._engines[worker, name] = Hosted(worker, name, path)
        self.packages.add(path.partition(":")[0].partition(".")[0])
        try:
            await made.create(read)
        except BaseException:
            self._engines.pop((worker, name), None)
            await made.close()
            raise
        if not name:
            self._pickle[worker] = pickle

    async def remove(self, worker: str, name: str) -> None:
        """Close an engine and forget it; with a guest's own engine also its others. Raises EngineNotFound."""
        if (worker, name) == (self.home, ""):
            raise EngineError(f"the engine of {worker} goes with its process: stop the worker")
        if (worker, name) not in self._engines:
            raise EngineNotFound(f"engine {name!r} of {worker} is not there")
        mine = [key for key in self._engines if key == (worker, name) or (not name and key[0] == worker)]
        await asyncio.gather(*(self._engines.pop(key).close() for key in mine))

    async def close(self) -> None:
        """Close all of them, those that came last first; what fails is logged."""
        self.closing = True
        for key in reversed(list(self._engines)):
            try:
                await self._engines.pop(key).close()
            except Exception:
                log.exception("%s could not be closed", key[1] or key[0])

    async def checkpoint(self) -> None:
        """Have each save itself, all at the same time; what fails is logged."""
        engines = list(self._engines.items())
        results = await asyncio.gather(*(engine.checkpoint() for _, engine in engines), return_exceptions=True)
        for (key, _), failed in zip(engines, results, strict=True):
            if failed is not None:
                log.error("the checkpoint of %s failed", key[1] or key[0], exc_info=failed)

    def health(self) -> list[dict[str, Any]]:
        """What each does."""
        return [engine.health() for engine in self._engines.values()]
