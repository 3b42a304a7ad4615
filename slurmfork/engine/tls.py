"""A channel over TCP with the run's TLS: a protocol of the event loop, which alone writes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from slurmfork import silence
from slurmfork.engine.channel import BUFFER, Loser, Piece, Taker, abandon, pieces
from slurmfork.engine.inbox import Inbox
from slurmfork.engine.shared import Lender
from slurmfork.engine.warm import Warm
from slurmfork.engine.wire import Frame
from slurmfork.errors import CodecError

log = logging.getLogger(__name__)

_SILENCE_S = 20


class TlsChannel(asyncio.BufferedProtocol):
    """Over TCP with the run's TLS; a protocol of the event loop."""

    lender: Lender | None = None

    def __init__(self, take: Taker, lost: Loser, made: Callable[[TlsChannel], None] = lambda channel: None) -> None:
        self._loop = asyncio.get_running_loop()
        self.memory: Warm | None = Warm(self._loop)
        self._inbox = Inbox(take, memory=self.memory)
        self._lost = lost
        self._made = made
        self._transport: asyncio.Transport | None = None
        self._waiting: deque[Piece] = deque()
        self._lock = threading.Lock()
        self._flush_due = False
        self._paused = False
        self._closing = False
        self._why = "the other side is gone"

    def fact(self, name: str) -> Any:
        """What the transport knows of the connection: ``ssl_object``."""
        assert self._transport is not None
        return self._transport.get_extra_info(name)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=4 * BUFFER)
        silence.notice(self.fact("socket"), _SILENCE_S)
        self._made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._closing = True
        self._inbox.close()
        self._lost(str(exc) if exc else self._why)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the event loop."""
        return self._inbox.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Called by the event loop."""
        if self._closing:
            return
        try:
            self._inbox.filled(nbytes)
        except CodecError as error:
            self._why = str(error)
            self.close()
        except Exception as error:  # a fault of ours must not take the others' connections along
            log.exception("a connection is given up")
            self._why = str(error)
            self.close()

    def pause_writing(self) -> None:
        """Called by the event loop."""
        self._paused = True

    def resume_writing(self) -> None:
        """Called by the event loop."""
        self._paused = False
        self._write()

    def send(self, frame: Frame) -> None:
        """See Channel: only the loop may write."""
        self.post(frame)

    def post(self, frame: Frame) -> None:
        """See Channel."""
        with self._lock:
            self._waiting.extend(pieces(frame))
            due, self._flush_due = self._flush_due, True
        if not due:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            self._flush_due = False
        self._write()

    def _write(self) -> None:
        while self._waiting and not self._paused and self._transport is not None and not self._closing:
            part = self._waiting.popleft().part
            if len(part) > BUFFER:  # so that there is a pause within it, too
                self._waiting.appendleft(Piece(memoryview(part)[BUFFER:]))
                part = memoryview(part)[:BUFFER]
            self._transport.write(part)

    def disown(self) -> None:
        """See Channel."""
        if self._transport is not None:
            abandon(self.fact("socket"))

    def close(self) -> None:
        """See Channel."""
        self._write()
        self._closing = True
        if self._transport is not None:
            self._transport.close()
