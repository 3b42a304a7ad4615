"""A guest: a worker without a process of its own, whose engine lives in the process of its target, the host.

It is made and removed by asking the host, and ends with it; where the host is started again, so is the guest.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurmfork.agent.outfit import Site
from slurmfork.agent.spawn import StartFailed
from slurmfork.agent.standing import Standing
from slurmfork.errors import SlurmforkError, one_line
from slurmfork.messages import StopResult, WorkerView
from slurmfork.names import LIVE_STATES, OVER_STATES, UP_STATES, WorkerState
from slurmfork.orders import Order
from slurmfork.spec.model import Ready

if TYPE_CHECKING:
    from slurmfork.engine.caller import Connection

TAIL_LINES = 20


class Guest:
    """One worker in another's process. Used as a Worker is, by the supervisor; ``host`` tells how its target stands."""

    in_hand = False
    start_failure: StartFailed | None = None

    def __init__(self, order: Order, site: Site, host: Callable[[str], WorkerView | None]) -> None:
        self.order = order
        self._site = site
        self._host = host
        self._wanted = True
        self._making: asyncio.Task[None] | None = None
        log_path = site.node.rundir.logs / site.node.rundir.log_name(order.target or order.worker)
        self._standing = Standing(order, node=site.node.name, log_path=str(log_path), tell=site.tell)
        self.view = self._standing.view

    @property
    def name(self) -> str:
        return self.order.worker

    def ended_after_all(self) -> None:
        """It has no processes that would not die."""

    @property
    def live(self) -> bool:
        """Whether it has an engine, or will have."""
        return self.view.state in LIVE_STATES

    @property
    def held(self) -> bool:
        """Whether its name is taken."""
        return self.live or self.view.state is WorkerState.PENDING

    # --- start

    def prepare(self) -> None:
        """See that the host is there; raises StartFailed."""
        host = self._host(self.order.target or "")
        if host is None or host.state not in UP_STATES or not host.endpoints:
            raise StartFailed(f"{self.order.target}, in whose process it is to live, is not up")
        self.view.gpus = list(host.gpus)

    def begin(self, *, told: bool) -> None:
        """Begin to have its engine made; ``told``: whoever asked for it tells the head."""
        host = self._host(self.order.target or "")
        assert host is not None
        assert host.pid is not None
        self._standing.begun(host.pid, checked=True, told=told)
        self._making = asyncio.ensure_future(self._make(host))

    async def _make(self, host: WorkerView) -> None:
        ready = self.order.ready or Ready(notify=True)
        try:
            await asyncio.wait_for(self._ask_to_make(host), ready.timeout)
        except asyncio.TimeoutError:
            self._fall(f"not ready within {ready.timeout:g} s")
        except Exception as error:
            cause = getattr(error.__cause__, "text", "")
            self.view.log_tail = "\n".join(cause.splitlines()[-TAIL_LINES:])
            self._fall(f"{type(error).__name__}: {one_line(str(error))}"[:500])
        else:
            self._standing.ready(list(host.endpoints))

    async def _ask_to_make(self, host: WorkerView) -> None:
        from slurmfork.engine import wire
        from slurmfork.engine.codec import pack
        from slurmfork.errors import Unreachable, WorkerFailed

        engine = self.order.engine
        assert engine is not None
        value = pack([engine.args, engine.kwargs])
        try:
            async with self._connection(host) as connection:
                future = connection.request(
                    self.name,
                    lambda number, _: wire.Create(number, self.name, "", engine.path, engine.pickle),
                    value,
                    (),
                )
                await asyncio.wrap_future(future)
        except (Unreachable, WorkerFailed):  # its host is gone: what becomes of that is told by ``host_changed``
            await asyncio.Event().wait()

    @contextlib.asynccontextmanager
    async def _connection(self, host: WorkerView) -> Any:
        from slurmfork.engine.caller import Connection

        connection: Connection = Connection(self, host)
        await connection.open()
        try:
            yield connection
        finally:
            connection.close()

    # What a connection asks of those who know the run; here nobody knows more than the agent itself.

    @property
    def run_id(self) -> str:
        """Of its run."""
        return self._site.node.run_id

    @property
    def credentials_directory(self) -> Path:
        """Of its run."""
        return self._site.node.rundir.credentials

    def engine_views(self, role: str) -> list[WorkerView]:
        """Nothing: a lost connection is the host's end."""
        return []

    # --- its host

    def host_changed(self, host: WorkerView) -> None:
        """Follow the process that it lives in."""
        if host.state in OVER_STATES and self.live:
            self._leave_off()
            self.view.log_tail = host.log_tail
            self._standing.ended(host.exit_status)
            words = f"{host.worker}, in whose process it was, is {host.state}"
            self._standing.become(host.state, f"{words}: {host.reason}" if host.reason else words)
        elif host.state is WorkerState.RESTARTING and self.live:
            self._leave_off()
            self._standing.ended(host.exit_status)
            self._standing.become(WorkerState.RESTARTING, f"{host.worker} is started again")
        elif host.state in UP_STATES and self.view.state is WorkerState.RESTARTING and self._wanted:
            self.view.restarts += 1
            self.begin(told=False)

    def _leave_off(self) -> None:
        if self._making is not None:
            self._making.cancel()
            self._making = None

    def _fall(self, reason: str) -> None:
        self._standing.ended(None)
        self._standing.become(WorkerState.FAILED, reason)

    # --- end

    def call_off(self) -> None:
        """It is not to be made again."""
        self._wanted = False

    async def words_read(self) -> None:
        """It has none but those that are in its view."""

    async def stop(self, grace: float | None = None, bound: float = 0.0) -> StopResult:
        """Have its engine close itself and be forgotten, within its grace; what runs in it cannot be ended by force."""
        begun = time.monotonic()
        self._wanted = False
        self._leave_off()
        if self.live:
            host = self._host(self.order.target or "")
            words = "stopped"
            if host is not None and host.state in UP_STATES and not self._site.closing:
                patience = self.order.stop.grace if grace is None else grace
                try:
                    await asyncio.wait_for(self._ask_to_remove(host), max(patience, 0.1))
                except (asyncio.TimeoutError, SlurmforkError) as error:
                    why = one_line(str(error)) or "it was still busy"
                    words = f"stopped, but its engine did not close: {why}"
            self._standing.ended(None)
            self._standing.become(WorkerState.STOPPED, words)
        return StopResult(worker=self.name, seconds=round(time.monotonic() - begun, 4))

    async def _ask_to_remove(self, host: WorkerView) -> None:
        from slurmfork.engine import wire

        async with self._connection(host) as connection:
            future = connection.request(
                self.name, lambda number, _: wire.Remove(number, self.name, ""), wire.NOTHING, ()
            )
            await asyncio.wrap_future(future)

    def discard(self) -> None:
        """It holds nothing of the node's."""

    def exited(self, code: int) -> None:
        """It has no process that could."""

    def signal(self, signum: int) -> bool:
        """It has no process to signal."""
        return False

    def catches(self, signum: int) -> bool:
        """It has no process that could."""
        return False

    def never_started(self, state: WorkerState, reason: str, status: int | None = None) -> WorkerView:
        """Its start was taken back; returns how that is to be told."""
        self.view.state, self.view.reason, self.view.ended = state, reason, time.time()
        return self.view
