"""The starter: the one long-lived thread that starts processes, and writes to the journal before and after.

All that may hang with a file system (logs, journal, exec) happens there, so that a slow disk holds up starts and
nothing else. What is asked of it is done in order; nothing of the event loop's state is touched by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from slurmfork import journal
from slurmfork.agent.command import arguments
from slurmfork.agent.namespace import Namespace
from slurmfork.agent.spawn import StartFailed, open_log, spawn
from slurmfork.errors import RunDirError
from slurmfork.journal import Journal, Record
from slurmfork.process import Identity
from slurmfork.scratch import private_directory

log = logging.getLogger(__name__)


@dataclass
class Launch:
    """One start of one worker: what is wanted, and when it is over what came of it.

    ``values`` fill the placeholders of ``command``; ``scratch`` is made. ``called_off``: it is not wanted any more.
    Afterwards there is a ``leader``, or a ``failure``; both where it runs but could not be journaled. ``log_begin``
    is where its own part of the log begins.
    """

    start_id: str
    worker: str
    command: str | list[str]
    values: Mapping[str, str]
    environment: Mapping[str, str]
    cwd: str
    log: Path
    scratch: Path
    called_off: bool = False
    leader: Identity | None = None
    failure: StartFailed | None = None
    log_begin: int = 0
    argv: list[str] = field(default_factory=list)


class Starter:
    """Starts processes and keeps the node's journal. Raises OSError where that cannot be opened.

    All that it starts is born in the ``namespace``. Raises OSError too where that cannot be entered.
    """

    def __init__(self, path: Path, namespace: Namespace | None = None) -> None:
        self._journal = Journal(path)
        self._namespace = namespace
        self._proc = namespace.proc if namespace else None
        self._entered: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way = 0
        self._finished = asyncio.Event()
        # A daemon: a disk that never answers must not keep the agent from ending.
        self._thread = threading.Thread(target=self._work, name="starter", daemon=True)
        self._thread.start()
        if (error := self._entered.get()) is not None:
            raise error

    @property
    def busy(self) -> bool:
        """Whether there may be a process of which only the thread knows yet."""
        return self._under_way > 0

    def start(self, launches: Sequence[Launch], over: Callable[[], None]) -> asyncio.Future[None]:
        """Begin to start these, all or none. When each has its leader or its failure, ``over`` is called, however
        late that is, and before ``busy`` ends; then the future is done.

        After a failure nothing further is started, and who was started already is the caller's to stop.
        """
        return self._do(lambda: _carry_out(launches, self._journal, self._proc), over)

    async def helper(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[Identity, int]:
        """Start a program for the agent's own use: who it is, and a descriptor of what it writes; raises StartFailed.

        It is in no journal, and reaped as orphans are.
        """
        started: list[tuple[Identity, int] | StartFailed] = []

        def work() -> None:
            output = os.memfd_create("output")
            try:
                started.append((spawn(argv, cwd="/", environment=environment, log=output, proc=self._proc), output))
            except StartFailed as failure:
                os.close(output)
                started.append(failure)

        await self._do(work, lambda: None)
        if isinstance(started[0], StartFailed):
            raise started[0]
        return started[0]

    def _do(self, work: Callable[[], None], over: Callable[[], None]) -> asyncio.Future[None]:
        """Have the thread do ``work``, and count it as busy until ``over`` was called."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._under_way += 1

        def settle() -> None:
            try:
                over()
            finally:
                self._under_way -= 1
                if not done.done():
                    done.set_result(None)

        def guarded() -> None:
            try:
                work()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    self._loop.call_soon_threadsafe(settle)

        self._queue.put(guarded)
        return done

    def note(self, *records: Record) -> None:
        """Write records to the journal without waiting for the disk; a failure is logged."""

        def work() -> None:
            try:
                self._journal.append(*records, sync=False)
            except OSError as error:
                log.error("the journal could not be written: %s", error)

        self._queue.put(work)

    async def close(self, timeout: float) -> None:
        """Do what is still to be done, for ``timeout`` seconds at most."""
        self._queue.put(None)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._finished.wait(), timeout)

    def _work(self) -> None:
        try:
            if self._namespace is not None:
                self._namespace.enter()
        except OSError as error:
            self._entered.put(error)
            return
        self._entered.put(None)
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception:
                log.exception("fault in the starter")
        self._journal.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._finished.set)


def _carry_out(launches: Sequence[Launch], into: Journal, proc: int | None) -> None:
    """Lay out, journal the intents, start, journal the starts; each step for all before the next."""
    logs: list[int] = []
    try:
        for launch in launches:
            _try(launch, lambda launch: logs.append(_lay_out(launch)))
        if any(launch.failure for launch in launches):
            return
        # An intent need not be on the disk: if the node dies, so does all that was started on it.
        _write(into, [_intent(launch) for launch in launches], launches, sync=False)
        for launch, descriptor in zip(launches, logs, strict=True):
            if any(launch.failure for launch in launches):
                break
            _try(launch, lambda launch, log=descriptor: _spawn(launch, log, proc))  # type: ignore[misc]
        started = [_started(launch) for launch in launches if launch.leader]
        if started:
            _write(into, started, launches, sync=True)
    except Exception as error:
        log.exception("fault in a start")
        for launch in launches:
            launch.failure = launch.failure or StartFailed(f"fault in the agent: {error}")
    finally:
        for descriptor in logs:
            os.close(descriptor)


def _try(launch: Launch, step: Callable[[Launch], None]) -> None:
    try:
        step(launch)
    except StartFailed as failure:
        launch.failure = failure


def _lay_out(launch: Launch) -> int:
    """Make its argument list, its scratch directory and its log; returns the log's descriptor."""
    try:
        launch.argv = arguments(launch.command, launch.values, launch.environment)
        private_directory(launch.scratch)
    except (ValueError, RunDirError) as error:
        raise StartFailed(str(error)) from None
    except OSError as error:
        raise StartFailed(f"{error.filename}: {error.strerror}") from None
    descriptor = open_log(launch.log)
    launch.log_begin = os.fstat(descriptor).st_size
    return descriptor


def _spawn(launch: Launch, descriptor: int, proc: int | None) -> None:
    if launch.called_off:
        raise StartFailed("stopped before it was started")
    launch.leader = spawn(launch.argv, cwd=launch.cwd, environment=launch.environment, log=descriptor, proc=proc)


def _write(into: Journal, records: Sequence[Record], launches: Sequence[Launch], *, sync: bool) -> None:
    try:
        into.append(*records, sync=sync)
    except OSError as error:
        for launch in launches:
            launch.failure = launch.failure or StartFailed(f"the journal cannot be written: {error}")


def _intent(launch: Launch) -> journal.Intent:
    return journal.Intent(start_id=launch.start_id, worker=launch.worker, argv=launch.argv)


def _started(launch: Launch) -> journal.Started:
    assert launch.leader is not None
    pid, start_time, boot_id = launch.leader
    return journal.Started(
        start_id=launch.start_id,
        worker=launch.worker,
        pid=pid,
        start_time=start_time,
        boot_id=boot_id,
        uid=os.geteuid(),
        argv=launch.argv,
    )
