"""The API: what clients, and workers through their agents, may ask of the head.

``Api.answer`` is the whole of it but for the event stream: method, path and body in, status and JSON out. Every
request is decoded into a typed struct before anything happens; what does not fit is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from slurmfork.errors import Refused
from slurmfork.head.forking import Forks
from slurmfork.head.metrics import exposition
from slurmfork.head.once import Once
from slurmfork.head.routes import Routes
from slurmfork.head.table import Table
from slurmfork.head.workers import Workers
from slurmfork.messages import (
    CancelReply,
    CancelRequest,
    Event,
    EventsQuery,
    EventsReply,
    ForkReply,
    ForkRequest,
    Health,
    NoQuery,
    PortsReply,
    PortsRequest,
    SignalReply,
    SignalRequest,
    StatusQuery,
    StatusView,
    StopReply,
    StopRequest,
    WorkersQuery,
    WorkersReply,
)
from slurmfork.serving import STATUS_OF, Answer, refusal

Cancel = Callable[[CancelRequest], Awaitable[CancelReply]]


class Api:
    """Answers requests from the table and the workers; ``cancel`` ends the run and returns a CancelReply."""

    routes = Routes()

    def __init__(self, table: Table, workers: Workers, cancel: Cancel) -> None:
        self._table = table
        self._workers = workers
        self._forks = Forks(table, workers)
        self._cancel = cancel
        self._once = Once()

    async def answer(self, method: str, target: str, body: bytes, caller: str) -> Answer:
        """What one request gets. ``caller`` is who asks, for the log; it was authenticated before."""
        path, _, query = target.partition("?")
        try:
            route = self.routes.find(method, path)
            reply = route.handler(self, route.read(query, body))
            if inspect.isawaitable(reply):
                reply = await reply
            data = reply.encode() if isinstance(reply, str) else msgspec.json.encode(reply)
            return Answer(200, data, {"Content-Type": route.media})
        except Exception as error:
            answer = refusal(error, f"{caller}: {method} {target}")
            if answer.status == STATUS_OF["method"]:
                answer.headers["Allow"] = ", ".join(self.routes.methods(path))
            return answer

    def stream(self, method: str, target: str) -> AsyncIterator[Event] | None:
        """Events as they happen, where that is what is asked for."""
        path, _, query = target.partition("?")
        if method != "GET":
            return None
        with contextlib.suppress(Refused, msgspec.DecodeError):
            asked = self.routes.find(method, path).read(query, b"")
            if isinstance(asked, EventsQuery) and asked.follow:
                return self._table.follow(asked.since)
        return None

    # --- what can be asked: the first line of each is its summary in the OpenAPI document

    @routes.get("/v1/health")
    def _health(self, asked: NoQuery) -> Health:
        """Whether the head is there, and the run's state."""
        return Health(ok=True, run_id=self._table.run_id, state=self._table.state)

    @routes.get("/v1/status")
    def _status(self, asked: StatusQuery) -> StatusView:
        """The whole picture: state, nodes, counts, workers."""
        view = self._table.view()
        if not asked.workers:
            view.workers = []
        return view

    @routes.get("/v1/workers")
    def _list(self, asked: WorkersQuery) -> WorkersReply:
        """Every worker, or those of one role."""
        views = self._table.view().workers
        return WorkersReply(workers=[view for view in views if asked.role in (msgspec.UNSET, view.role)])

    @routes.get("/v1/events")
    def _events(self, asked: EventsQuery) -> EventsReply:
        """What has happened; with follow also what happens, as it happens."""
        return EventsReply(events=[event for event in self._table.events if event.seq > asked.since])

    @routes.post(
        "/v1/fork",
        *("unknown", "conflict", "in_use", "not_running", "stopping"),
        *("misfit", "start_failed", "timeout", "unreachable"),
    )
    async def _fork(self, asked: ForkRequest) -> ForkReply:
        """Start children beside each target, all or none; answered when all are up."""
        return await self._once.run(asked.request_id, asked, lambda: self._forks.fork(asked))

    @routes.post("/v1/stop", "unknown", "conflict")
    async def _stop(self, asked: StopRequest) -> StopReply:
        """Stop a role or one worker, with all below it; answered when they are gone."""
        if asked.request_id is None:
            return await self._workers.stop(asked)
        return await self._once.run(asked.request_id, asked, lambda: self._workers.stop(asked))

    @routes.post("/v1/signal", "unknown", "unreachable")
    async def _signal(self, asked: SignalRequest) -> SignalReply:
        """Send a signal to the workers of a role, or to one."""
        return await self._workers.signal(asked)

    @routes.post("/v1/ports", "unknown", "no_ports", "unreachable")
    async def _ports(self, asked: PortsRequest) -> PortsReply:
        """Reserve ports on a worker's node; they go with it."""
        return await self._workers.ports(asked)

    @routes.post("/v1/cancel")
    async def _end(self, asked: CancelRequest) -> CancelReply:
        """End the run; answered when nothing of it is left."""
        return await self._cancel(asked)

    @routes.get("/v1/openapi.json")
    def _describe(self, asked: NoQuery) -> dict[str, Any]:
        """This document."""
        from slurmfork.head import openapi

        return openapi.document(self.routes)

    @routes.get("/metrics")
    def _metrics(self, asked: NoQuery) -> str:
        """Figures of the run in Prometheus' text format."""
        return exposition(self._table)
