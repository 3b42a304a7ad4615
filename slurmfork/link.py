"""The link: one mutual-TLS connection between an agent and the head, over which either side asks the other.

A frame a line (``messages.Frame``), requests answered in any order. The agent holds the connection, so nodes
listen on no TCP port at all. Whose certificate is accepted is the business of the TLS context that is handed in.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from slurmfork.errors import Refused, Unreachable
from slurmfork.messages import Frame

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_FRAME = 64 * 1024 * 1024  # a plan of thousands of workers with their environments fits well within
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Frame)

Handler = Callable[[str, msgspec.Raw], Awaitable[Any]]


class Link:
    """One end of the connection.

    ``handler(op, body)`` serves what the other side asks; it returns a struct, or raises Refused. Requests are
    served concurrently, each in a task of its own. ``run()`` reads until the connection ends.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Frame]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    async def run(self) -> None:
        """Serve the connection until it ends, however it ends; pending requests then raise Unreachable."""
        try:
            while line := await self._reader.readline():
                self._take(_decoder.decode(line))
        except (OSError, ValueError, asyncio.IncompleteReadError, msgspec.DecodeError) as error:
            log.warning("link lost: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """End the connection; harmless when repeated."""
        self.closed = True
        self._writer.close()
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

    async def drain(self) -> None:
        """Wait until what was sent has left this process."""
        with contextlib.suppress(OSError):
            await self._writer.drain()

    def _send(self, frame: Frame) -> None:
        self._writer.write(_encoder.encode(frame) + b"\n")

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
