"""The link: one mutual-TLS connection between an agent and the head, over which either side asks the other.

A frame a line (``messages.Frame``), requests answered in any order. The agent holds the connection, so nodes
listen on no TCP port at all. Whose certificate is accepted is the business of the TLS context that is handed in.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import msgspec

from slurmfork import silence
from slurmfork.errors import Refused, Unreachable
from slurmfork.orders import Frame

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FRAME = 64 * 1024 * 1024  # a plan of thousands of workers with their environments fits well within
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Frame)

_SILENCE_S = 20
Handler = Callable[[str, msgspec.Raw], Awaitable[Any]]


class Link(asyncio.Protocol):
    """One end of the connection.

    ``handler(op, body)`` serves what the other side asks; it returns a struct, or raises Refused. Requests are
    served concurrently, each in a task of its own. ``made`` hears that there is a connection.
    """

    def __init__(self, handler: Handler, made: Callable[[], None] = lambda: None) -> None:
        self._handler = handler
        self._made = made
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.get_running_loop().create_future()
        self._parts: list[bytes] = []  # of a frame whose end has not come yet
        self._size = 0
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    async def ended(self) -> None:
        """Wait until the connection has ended, however it did, and what was sent before has left."""
        await asyncio.shield(self._ended)

    def fact(self, name: str) -> Any:
        """What the transport knows of the connection: ``ssl_object``, ``socket``."""
        assert self._transport is not None
        return self._transport.get_extra_info(name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is of no class of asyncio's
        silence.notice(self.fact("socket"), _SILENCE_S)
        self._made()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        if exc is not None:
            log.warning("link lost: %s", exc)
        self.close()
        if not self._ended.done():
            self._ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        end, *more = data.split(b"\n")
        self._parts.append(end)
        self._size += len(end)
        if self._size > MAX_FRAME:
            log.warning("link lost: a frame of more than %d bytes", MAX_FRAME)
            self.close()
        if not more or self.closed:
            return
        *whole, rest = more
        lines = [b"".join(self._parts), *whole]
        self._parts, self._size = [rest], len(rest)
        try:
            for line in lines:
                self._take(_decoder.decode(line))
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("link lost: what came is no frame: %s", error)
            self.close()

    def close(self) -> None:
        """End the connection when what was sent has left; harmless when repeated. Pending requests are given up."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()
        self.give_up("the connection between head and agent was lost")

    def give_up(self, reason: str) -> None:
        """Have all pending requests raise Unreachable. The other side may do them all the same, later."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unreachable(reason))
                future.exception()  # whoever waits sees it; nobody waiting is no error
        self._waiting.clear()

    async def ask(self, op: str, body: Any, kind: type[T], timeout: float | None = None) -> T:
        """Send a request and return its answer as ``kind``; raises Refused, Unreachable, asyncio.TimeoutError."""
        if self.closed:
            raise Unreachable("the connection between head and agent was lost")
        number = next(self._ids)
        future: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._send(Frame(id=number, op=op, body=msgspec.Raw(_encoder.encode(body))))
        try:
            answer = await asyncio.wait_for(future, timeout)
        finally:
            self._waiting.pop(number, None)
        if answer.error:
            raise Refused(answer.error, answer.kind or "refused", answer.body)
        return msgspec.json.decode(answer.body, type=kind)

    def tell(self, op: str, body: Any) -> None:
        """Send a notice that nobody answers; lost without a word if the connection is."""
        if not self.closed:
            self._send(Frame(op=op, body=msgspec.Raw(_encoder.encode(body))))

    def _send(self, frame: Frame) -> None:
        assert self._transport is not None
        self._transport.write(_encoder.encode(frame) + b"\n")

    def _take(self, frame: Frame) -> None:
        if frame.op:
            task = asyncio.ensure_future(self._serve(frame))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif (future := self._waiting.get(frame.id)) and not future.done():
            future.set_result(frame)

    async def _serve(self, frame: Frame) -> None:
        try:
            result = await self._handler(frame.op, frame.body)
        except Refused as error:
            answer = Frame(error=str(error), kind=error.kind, body=msgspec.Raw(_encoder.encode(error.detail)))
        except msgspec.ValidationError as error:
            answer = Frame(error=f"malformed {frame.op}: {error}", kind="malformed")
        except Exception as error:  # a fault of one request must not take the node down
            log.exception("%s failed", frame.op)
            answer = Frame(error=f"{type(error).__name__}: {error}", kind="internal")
        else:
            answer = Frame(body=msgspec.Raw(_encoder.encode(result)))
        if frame.id and not self.closed:
            answer.id = frame.id
            self._send(answer)
