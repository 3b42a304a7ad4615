"""What head and agents do alike when they are asked over HTTP: take a body within a limit, and say no in one way."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import msgspec

from slurmfork.errors import Refused, SlurmforkError, one_line
from slurmfork.messages import ErrorReply, WorkerView

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

Handler: TypeAlias = "Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]"

MAX_BODY = 1024 * 1024
JSON = "application/json"
STATUS_OF = {
    "malformed": 400,
    "refused": 403,
    "unknown": 404,
    "unknown_path": 404,
    "method": 405,
    "conflict": 409,
    "in_use": 409,
    "not_running": 409,
    "stopping": 409,
    "too_large": 413,
    "misfit": 422,
    "no_ports": 422,
    "start_failed": 422,
    "timeout": 422,
    "internal": 500,
    "unreachable": 503,
}


class Answer(NamedTuple):
    """What is answered over HTTP."""

    status: int
    body: bytes
    headers: dict[str, str]


def server(handle: Handler) -> web.Server:
    """An HTTP server. It takes bodies as they come: one that is compressed could be larger than any limit."""
    from aiohttp import web

    words = logging.getLogger("slurmfork.http")
    words.addFilter(_briefly)
    return web.Server(handle, access_log=None, auto_decompress=False, logger=words)


def _briefly(record: logging.LogRecord) -> bool:
    """What a client did wrong is a line of the log; a traceback is for faults of our own."""
    from aiohttp.http_exceptions import HttpProcessingError

    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, (HttpProcessingError, ConnectionError)):
        record.msg, record.args = f"{record.getMessage()}: {one_line(str(error))}", ()
        record.exc_info = None
    return True


async def read_body(request: web.BaseRequest) -> bytes:
    """The whole body; raises Refused for one that is too large, or that breaks off."""
    from aiohttp import web

    announced, size, parts = request.content_length or 0, 0, []
    try:
        if announced <= MAX_BODY and request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # the answer has not begun
        while max(announced, size) <= MAX_BODY and (part := await request.content.readany()):
            size += len(part)
            parts.append(part)
    except (web.RequestPayloadError, ConnectionError) as error:
        raise Refused(f"malformed request: {error}", "malformed") from None
    if max(announced, size) > MAX_BODY:
        raise Refused(f"the request is larger than {MAX_BODY} bytes", "too_large")
    return b"".join(parts)


def refusal(error: Exception, what: str) -> Answer:
    """What is answered in place of a reply. ``what`` was asked, and by whom, is for the log."""
    reply = ErrorReply(error=one_line(str(error)), kind="internal")
    if isinstance(error, Refused):
        reply.kind, reply.workers = error.kind, _workers_of(error)
    elif isinstance(error, SlurmforkError):
        reply.kind = "unreachable"
    elif isinstance(error, (msgspec.DecodeError, UnicodeDecodeError)):
        reply.kind, reply.error = "malformed", f"malformed request: {reply.error}"
    else:
        log.error("a fault", exc_info=error)
        reply.error = f"a fault: {type(error).__name__}: {reply.error}"
    log.warning("%s refused: %s", one_line(what)[:200], reply.error)
    return Answer(STATUS_OF.get(reply.kind, 422), msgspec.json.encode(reply), {"Content-Type": JSON})


def _workers_of(error: Refused) -> list[WorkerView]:
    return [view for view in error.detail if isinstance(view, WorkerView)] if isinstance(error.detail, list) else []


def response(answer: Answer) -> web.Response:
    """The same for the HTTP library."""
    from aiohttp import web

    return web.Response(status=answer.status, body=answer.body, headers=answer.headers)
