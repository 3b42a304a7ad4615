"""The API: what clients, and workers through their agents, may ask of the head.

``Api.answer`` is the whole of it but for the event stream: method, path and body in, status and JSON out. The
HTTP server around it (aiohttp, mutual TLS) adds the stream and nothing else. Every request body is decoded into a
typed struct before anything happens; what does not fit is refused by name.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import msgspec

from slurmfork import credentials
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.head.forking import Forks
from slurmfork.head.metrics import exposition
from slurmfork.head.once import Once
from slurmfork.head.table import Table
from slurmfork.head.workers import Workers
from slurmfork.messages import (
    CancelRequest,
    ErrorReply,
    ForkRequest,
    PortsRequest,
    SignalRequest,
    StopRequest,
    WorkerView,
)

if TYPE_CHECKING:
    import socket

    from aiohttp import web

log = logging.getLogger(__name__)

MAX_BODY = 1024 * 1024
STATUS_OF = {
    "malformed": 400,
    "unknown": 404,
    "unknown_path": 404,
    "method": 405,
    "conflict": 409,
    "in_use": 409,
    "not_running": 409,
    "stopping": 409,
    "too_large": 413,
    "misfit": 422,
    "start_failed": 422,
    "timeout": 422,
    "internal": 500,
    "unreachable": 503,
}

Cancel = Callable[[CancelRequest], Awaitable[Any]]


class Api:
    """Answers requests from the table and the workers; ``cancel`` ends the run and returns a CancelReply."""

    def __init__(self, table: Table, workers: Workers, cancel: Cancel) -> None:
        self._table = table
        self._workers = workers
        self._forks = Forks(table, workers)
        self._cancel = cancel
        self._once = Once()
        self._posts: dict[str, Callable[[bytes], Awaitable[Any]]] = {
            "/v1/fork": self._fork,
            "/v1/stop": self._stop,
            "/v1/signal": self._signal,
            "/v1/ports": self._ports,
            "/v1/cancel": self._end,
        }
        self._gets: dict[str, Callable[[dict[str, list[str]]], Any]] = {
            "/v1/health": self._health,
            "/v1/status": self._status,
            "/v1/workers": self._list,
            "/v1/events": self._events,
        }

    async def answer(self, method: str, target: str, body: bytes, caller: str) -> tuple[int, bytes]:
        """(HTTP status, JSON). ``caller`` is who asks, for the log; it was authenticated before."""
        try:
            return 200, msgspec.json.encode(await self._dispatch(method, target, body))
        except Refused as error:
            reply = ErrorReply(error=str(error), kind=error.kind, workers=_workers_of(error))
        except SlurmforkError as error:
            reply = ErrorReply(error=str(error), kind="unreachable")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            reply = ErrorReply(error=f"malformed request: {error}", kind="malformed")
        except Exception as error:
            log.exception("%s %s failed", method, target)
            reply = ErrorReply(error=f"fault in the head: {type(error).__name__}: {error}", kind="internal")
        log.warning("%s: %s %s refused: %s", caller, method, target[:200], reply.error)
        return STATUS_OF.get(reply.kind, 422), msgspec.json.encode(reply)

    async def _dispatch(self, method: str, target: str, body: bytes) -> Any:
        parts = urlsplit(target)
        if method == "GET" and (get := self._gets.get(parts.path)):
            return get(parse_qs(parts.query))
        if method == "POST" and (post := self._posts.get(parts.path)):
            return await post(body)
        if parts.path in self._gets or parts.path in self._posts:
            raise Refused(f"{parts.path} does not take {method}", "method")
        raise Refused(f"there is no {parts.path[:200]}", "unknown_path")

    def _health(self, query: dict[str, list[str]]) -> Any:
        return {"ok": True, "run_id": self._table.run_id, "state": self._table.state}

    def _status(self, query: dict[str, list[str]]) -> Any:
        view = self._table.view()
        if query.get("workers") == ["0"]:
            view.workers = []
        return view

    def _list(self, query: dict[str, list[str]]) -> Any:
        role = query.get("role", [None])[0]
        views = self._table.view().workers
        return {"workers": [view for view in views if role in (None, view.role)]}

    def _events(self, query: dict[str, list[str]]) -> Any:
        since = event_number(query)
        return {"events": [event for event in self._table.events if event.seq > since]}

    async def _fork(self, body: bytes) -> Any:
        request = msgspec.json.decode(body, type=ForkRequest)
        return await self._once.run(request.request_id, request, lambda: self._forks.fork(request))

    async def _stop(self, body: bytes) -> Any:
        request = msgspec.json.decode(body, type=StopRequest)
        if request.request_id is None:
            return await self._workers.stop(request)
        return await self._once.run(request.request_id, request, lambda: self._workers.stop(request))

    async def _signal(self, body: bytes) -> Any:
        return await self._workers.signal(msgspec.json.decode(body, type=SignalRequest))

    async def _ports(self, body: bytes) -> Any:
        return await self._workers.ports(msgspec.json.decode(body, type=PortsRequest))

    async def _end(self, body: bytes) -> Any:
        return await self._cancel(msgspec.json.decode(body, type=CancelRequest))

    # --- the HTTP server

    async def serve(self, sock: socket.socket, context: ssl.SSLContext) -> Callable[[], Awaitable[None]]:
        """Serve on a bound socket; returns what closes the server again. Needs aiohttp to be imported already."""
        from aiohttp import web

        server = web.Server(self._handle, access_log=None)
        runner = web.ServerRunner(server)
        await runner.setup()
        await web.SockSite(runner, sock, ssl_context=context, shutdown_timeout=2).start()
        return runner.cleanup

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        from aiohttp import web

        who = credentials.holder(request.transport and request.transport.get_extra_info("ssl_object"))
        if who != credentials.CLIENT:
            log.warning("request refused: the peer's certificate is of %r, not of a client", who)
            return web.Response(status=403, text='{"error":"this certificate is not a client\'s","kind":"refused"}')
        if request.method == "GET" and request.path == "/metrics":
            return web.Response(text=exposition(self._table), content_type="text/plain")
        if request.method == "GET" and request.path == "/v1/events" and request.query.get("follow") == "1":
            return await self._stream(request)
        if (request.content_length or 0) > MAX_BODY:
            return self._too_large(who)
        body = await request.content.read(MAX_BODY + 1)
        while len(body) <= MAX_BODY and (more := await request.content.read(MAX_BODY + 1 - len(body))):
            body += more
        if len(body) > MAX_BODY:
            return self._too_large(who)
        status, answer = await self.answer(request.method, request.path_qs, body, who)
        return web.Response(status=status, body=answer, content_type="application/json")

    def _too_large(self, who: str) -> web.Response:
        from aiohttp import web

        log.warning("%s: a body of more than %d bytes refused", who, MAX_BODY)
        reply = ErrorReply(error=f"the request is larger than {MAX_BODY} bytes", kind="too_large")
        response = web.Response(status=413, body=msgspec.json.encode(reply), content_type="application/json")
        response.force_close()
        return response

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        """Events as they happen, one JSON document a line, until the client leaves or the run is over."""
        from aiohttp import web

        try:
            since = event_number({key: [value] for key, value in request.query.items()})
        except Refused as error:
            return web.Response(status=400, body=msgspec.json.encode(ErrorReply(error=str(error), kind=error.kind)))
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):  # the client has seen enough
            async for event in self._table.follow(since):
                await response.write(msgspec.json.encode(event) + b"\n")
        return response


def event_number(query: dict[str, list[str]]) -> int:
    """``since`` of a query; raises Refused if it is not a number."""
    text = query.get("since", ["0"])[0]
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Refused("since must be the number of an event", "malformed")
    return int(text)


def _workers_of(error: Refused) -> list[WorkerView]:
    return [view for view in error.detail if isinstance(view, WorkerView)] if isinstance(error.detail, list) else []
