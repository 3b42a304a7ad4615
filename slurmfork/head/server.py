"""The head's HTTPS server: lets clients in by their certificates, has the API answer, and streams events."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from slurmfork import credentials
from slurmfork.errors import Refused
from slurmfork.head.api import Api
from slurmfork.head.routes import LINES
from slurmfork.messages import Event
from slurmfork.serving import read_body, refusal, response, server

if TYPE_CHECKING:
    import socket

    from aiohttp import web


async def serve(api: Api, sock: socket.socket, context: ssl.SSLContext) -> Callable[[], Awaitable[None]]:
    """Serve on a bound socket; returns what closes the server again. Needs aiohttp to be imported already."""
    from aiohttp import web

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        return await _handle(api, request)

    runner = web.ServerRunner(server(handle))
    await runner.setup()
    await web.SockSite(runner, sock, ssl_context=context, shutdown_timeout=2).start()
    return runner.cleanup


async def _handle(api: Api, request: web.BaseRequest) -> web.StreamResponse:
    who = credentials.holder(request.transport and request.transport.get_extra_info("ssl_object"))
    if who != credentials.CLIENT:
        return response(refusal(Refused("this certificate is not a client's", "refused"), f"{who}: a request"))
    events = api.stream(request.method, request.path_qs)
    if events is not None:
        return await _stream(request, events)
    try:
        body = await read_body(request)
    except Refused as error:
        answer = response(refusal(error, f"{who}: {request.method} {request.path_qs}"))
        answer.force_close()  # the rest of it may still come
        return answer
    return response(await api.answer(request.method, request.path_qs, body, who))


async def _stream(request: web.BaseRequest, events: AsyncIterator[Event]) -> web.StreamResponse:
    """One JSON document a line, until the client leaves or the run is over."""
    from aiohttp import web

    answer = web.StreamResponse(headers={"Content-Type": LINES})
    await answer.prepare(request)
    with contextlib.suppress(ConnectionError):  # the client has seen enough
        async for event in events:
            await answer.write(msgspec.json.encode(event) + b"\n")
    return answer
