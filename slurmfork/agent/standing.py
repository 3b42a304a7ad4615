"""How a worker stands, and telling the head of it: every change of state at once, what it says of itself now and then.

Decides nothing: a worker says what it has become, this writes it down and passes it on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from slurmfork.messages import WorkerView
from slurmfork.names import UP_STATES, WorkerState
from slurmfork.orders import Order

log = logging.getLogger(__name__)

STATUS_INTERVAL_S = 0.25


class Standing:
    """One worker's ``view``, and ``tell``, which sends it."""

    def __init__(self, order: Order, *, node: str, log_path: str, tell: Callable[[WorkerView], None]) -> None:
        role, _, index = order.worker.partition("/")
        self.view = WorkerView(
            worker=order.worker,
            role=role,
            index=int(index),
            node=node,
            target=order.target,
            rank=order.rank,
            log=log_path,
        )
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._status_due: asyncio.TimerHandle | None = None

    def become(self, state: WorkerState, reason: str = "", *, told: bool = False) -> None:
        """It is in ``state`` now. ``told``: somebody else tells the head."""
        if (state, reason) != (self.view.state, self.view.reason):
            # What goes as it should is in the journal and in the head's events.
            level = logging.DEBUG if state in (*UP_STATES, WorkerState.STARTING) else logging.INFO
            log.log(level, "%s is %s%s", self.view.worker, state, f": {reason}" if reason else "")
        self.view.state, self.view.reason = state, reason
        if not told:
            self.tell()

    def tell(self) -> None:
        """Send it as it is; what it said of itself goes along."""
        if self._status_due is not None:
            self._status_due.cancel()
            self._status_due = None
        self._tell(self.view)

    def said(self, status: str) -> None:
        """A STATUS line of the worker, kept as its reason; told in its time, however often it changes."""
        if self.view.state in (*UP_STATES, WorkerState.STARTING) and status != self.view.reason:
            self.view.reason = status
            if self._status_due is None:
                self._status_due = self._loop.call_later(STATUS_INTERVAL_S, self.tell)

    def begun(self, pid: int, *, checked: bool, told: bool) -> None:
        """It has a process; ``checked``: whether it has yet to become ready. ``told`` as for ``become``."""
        self.view.pid, self.view.started = pid, time.time()
        self.view.ready = self.view.ended = self.view.exit_status = None
        self.view.endpoints = []
        self.view.log_tail = ""
        self.become(WorkerState.STARTING if checked else WorkerState.RUNNING, told=told)

    def ready(self, endpoints: list[str]) -> None:
        """It passed its readiness check; ``endpoints``: where it says that its engine is called."""
        self.view.endpoints = endpoints
        self.view.ready = time.time()
        self.become(WorkerState.READY, self.view.reason)

    def ended(self, exit_status: int | None) -> None:
        """It has no process any more; what that makes of it is told by whoever knows."""
        self.view.endpoints = []
        self.view.exit_status, self.view.ended, self.view.pid = exit_status, time.time(), None
