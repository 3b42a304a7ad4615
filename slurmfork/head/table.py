"""The head's table: the one picture of the run (state, nodes, workers, events) that everything else reads.

All changes go through its methods, which number them, record events, wake waiters and keep ``status.json`` and
``events.jsonl`` up to date from a thread of their own, so that a slow file system never holds up the run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import msgspec

from slurmfork.messages import Event, NodeView, StatusView, WorkerCounts, WorkerView
from slurmfork.names import LIVE_STATES, UP_STATES, RunState, WorkerState, natural
from slurmfork.rundir import RunDir, replace_file

log = logging.getLogger(__name__)

SAVE_INTERVAL = 0.25
EVENTS_KEPT = 20_000


class Table:
    """State of one run. Lives in the head's event loop; not thread-safe, and need not be."""

    def __init__(self, run_id: str, rundir: RunDir) -> None:
        self.run_id = run_id
        self.state = RunState.STARTING
        self.reason = ""
        self.exit_status: int | None = None
        self.nodes: dict[str, NodeView] = {}
        self.workers: dict[str, WorkerView] = {}
        self.events: list[Event] = []
        self.seq = 0
        self.started = time.time()
        self.ready: float | None = None
        self._rundir = rundir
        self._changed = asyncio.Event()
        self._unsaved: list[Event] = []
        self._save_due: asyncio.TimerHandle | None = None
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="status")

    # --- changes

    def set_state(self, state: RunState, reason: str = "", exit_status: int | None = None) -> None:
        """Move the run to ``state``; the reason is what people read in `status`."""
        self.state, self.reason = state, reason
        if exit_status is not None:
            self.exit_status = exit_status
        if state is RunState.READY:
            self.ready = time.time()
        log.info("run is %s%s", state, f": {reason}" if reason else "")
        self.event("run", state=str(state), message=reason)

    def update_worker(self, view: WorkerView) -> None:
        """Take an agent's word on a worker; its placement is the head's own knowledge and stays."""
        known = self.workers.get(view.worker)
        if known is not None:
            view.rank, view.target = known.rank, known.target
        self.workers[view.worker] = view
        if known is None or (known.state, known.pid, known.reason) != (view.state, view.pid, view.reason):
            self.event("worker", state=str(view.state), worker=view.worker, node=view.node, message=view.reason)
        else:
            self._touch()

    def forget_role(self, role: str) -> None:
        """Drop the workers of a role that is over, so that its name is free again."""
        for name in [view.worker for view in self.of_role(role)]:
            del self.workers[name]
        self._touch()

    def event(self, kind: str, *, state: str = "", worker: str | None = None, node: str | None = None,
              message: str = "") -> None:  # fmt: skip
        """Record that something happened."""
        self._touch()
        entry = Event(seq=self.seq, time=time.time(), kind=kind, state=state, worker=worker, node=node, message=message)
        self.events.append(entry)
        self._unsaved.append(entry)
        if len(self.events) > EVENTS_KEPT:
            del self.events[: EVENTS_KEPT // 10]

    # --- reading

    def of_role(self, role: str) -> list[WorkerView]:
        """The workers of a role, in index order."""
        return sorted((view for view in self.workers.values() if view.role == role), key=lambda view: view.index)

    def live(self) -> list[WorkerView]:
        """Workers that have, or will have, a process."""
        return [view for view in self.workers.values() if view.state in LIVE_STATES]

    def all_up(self, workers: Iterable[str]) -> bool:
        """Whether each of these is ready, or runs without a readiness check, or already ended well."""
        good = UP_STATES | {WorkerState.EXITED}
        return all((view := self.workers.get(name)) is not None and view.state in good for name in workers)

    def counts(self) -> WorkerCounts:
        counts = WorkerCounts(total=len(self.workers))
        for view in self.workers.values():
            counts.ready += view.state is WorkerState.READY
            counts.running += view.state is WorkerState.RUNNING
            counts.failed += view.state is WorkerState.FAILED
        return counts

    def view(self) -> StatusView:
        """The whole picture."""
        return StatusView(
            run_id=self.run_id,
            state=self.state,
            reason=self.reason,
            exit_status=self.exit_status,
            nodes=[self.nodes[name] for name in sorted(self.nodes, key=natural)],
            counts=self.counts(),
            workers=sorted(self.workers.values(), key=lambda view: (view.role, view.index)),
            seq=self.seq,
            updated=time.time(),
            started=self.started,
            ready=self.ready,
        )

    # --- waiting

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until ``condition()`` holds; it is looked at after every change."""
        while not condition():
            await self._changed.wait()

    async def follow(self, since: int) -> AsyncIterator[Event]:
        """Events after number ``since``, those to come included, for ever."""
        while True:
            changed = self._changed
            for entry in [entry for entry in self.events if entry.seq > since]:
                since = entry.seq
                yield entry
            if changed is self._changed:
                await changed.wait()

    # --- disk

    def _touch(self) -> None:
        self.seq += 1
        self._changed.set()
        self._changed = asyncio.Event()
        if self._save_due is None:
            self._save_due = asyncio.get_running_loop().call_later(SAVE_INTERVAL, self._save)

    def _save(self) -> None:
        self._save_due = None
        unsaved, self._unsaved = self._unsaved, []
        self._disk.submit(self._write, msgspec.json.encode(self.view()), unsaved)

    def _write(self, status: bytes, events: list[Event]) -> None:
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            descriptor = os.open(self._rundir.events, flags, 0o600)
            try:
                os.write(descriptor, b"".join(msgspec.json.encode(entry) + b"\n" for entry in events))
            finally:
                os.close(descriptor)
            replace_file(self._rundir.status, status, durable=False)
        except OSError as error:
            log.warning("status could not be saved: %s", error)

    async def close(self) -> None:
        """Write what is not written yet."""
        if self._save_due is not None:
            self._save_due.cancel()
        self._save()
        await asyncio.get_running_loop().run_in_executor(None, self._disk.shutdown)
