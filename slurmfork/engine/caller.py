"""The caller: one connection to a host, over which any number of calls are under way, answered in any order.

A call is sent once. When a connection is lost, the head's word on the worker decides: if it lives, another connection
is made and what was not answered is sent again under its old number, which the host does not do twice; if it is gone,
the calls fail with its exit status and the end of its log.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import socket
import threading
from collections.abc import Callable, Collection
from concurrent.futures import InvalidStateError

from slurmfork import credentials
from slurmfork.engine import loss, wire
from slurmfork.engine.channel import Channel
from slurmfork.engine.codec import Packed
from slurmfork.engine.hosting import TLS, UNIX
from slurmfork.engine.inbox import Arrived
from slurmfork.engine.pending import CallFuture, Lost, Pending, Sink, failure_of, value_of
from slurmfork.engine.source import Source
from slurmfork.engine.tls import TlsChannel
from slurmfork.engine.unix import UnixChannel
from slurmfork.errors import CodecError, SlurmforkError, Unreachable
from slurmfork.messages import WorkerView

CONNECT_TIMEOUT_S = 10.0
_BRIEF_S, _FUTILE = 10.0, 5  # so many connections in a row, none of which had an answer or lived that long, are enough
_MANY = 64  # answers, of which the host is told if no call tells it
_TELL_AFTER_S = 0.1


class Connection:
    """A connection to the host of ``view``. Made and opened in the background loop; ``request`` is for any thread."""

    def __init__(self, source: Source, view: WorkerView) -> None:
        self._source = source
        self._view = view
        self._loop = asyncio.get_running_loop()
        self._session = secrets.token_hex(16)
        self._channel: Channel | None = None
        self._welcome: asyncio.Future[wire.Welcome] = self._loop.create_future()
        self._numbers = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._received: list[int] = []
        self._telling = False
        self._lock = threading.Lock()
        self._opened, self._futile = 0.0, 0
        self.lost = False

    # --- opening

    async def open(self) -> None:
        """Connect by the first endpoint that answers; raises Unreachable."""
        reasons = []
        for endpoint in self._view.endpoints:
            try:
                await asyncio.wait_for(self._open(endpoint), CONNECT_TIMEOUT_S)
            except (OSError, asyncio.TimeoutError, SlurmforkError) as error:
                reasons.append(str(error) or f"{endpoint} does not answer")
            else:
                self._opened, self.lost = self._loop.time(), False
                return
        raise Unreachable(f"{self._view.worker} cannot be reached: {'; '.join(dict.fromkeys(reasons))}")

    async def _open(self, endpoint: str) -> None:
        self._welcome = self._loop.create_future()
        channel: Channel
        if endpoint.startswith(UNIX):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(endpoint.removeprefix(UNIX))
            except BaseException:
                sock.close()
                raise
            channel = UnixChannel(sock, self._take, lambda why: self._gone(channel, why))
        else:
            host, _, port = endpoint.removeprefix(TLS).rpartition(":")
            context = credentials.client_context(self._source.credentials_directory)
            channel = tls = TlsChannel(self._take, lambda why: self._gone(channel, why))
            name = credentials.engine_name(self._source.run_id)
            await self._loop.create_connection(
                lambda: tls, host.strip("[]"), int(port), ssl=context, server_hostname=name
            )
        self._channel = channel
        channel.send(wire.frame(wire.Hello(self._source.run_id, self._session)))
        try:
            await self._welcome
        except BaseException:
            self._channel = None
            channel.close()
            raise

    def close(self) -> None:
        """End it, in its loop; what is not answered is not waited for."""
        with self._lock:
            self.lost = True
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    # --- calls, from any thread

    def request(
        self,
        worker: str,
        make: Callable[[int, list[int]], wire.Message],
        value: Packed,
        packages: Collection[str],
        *,
        timeout: float | None = None,
    ) -> CallFuture:
        """Send one; ``make`` makes the message of its number and the answers that have come. Raises Lost."""
        number = next(self._numbers)
        future = CallFuture(number, self.give_up)
        self._send(number, Pending(worker, packages, future=future), make, value)
        if timeout is not None:
            self._loop.call_soon_threadsafe(self._limit, number, timeout)
        return future

    def stream(
        self,
        worker: str,
        make: Callable[[int, list[int]], wire.Message],
        value: Packed,
        packages: Collection[str],
        sink: Sink,
    ) -> int:
        """Send one whose items ``sink`` hears, in the background loop; its number. Raises Lost."""
        number = next(self._numbers)
        self._send(number, Pending(worker, packages, sink=sink), make, value)
        return number

    def more(self, number: int, items: int) -> None:
        """Let so many more items of a stream come."""
        self._say(wire.More(number, items))

    def give_up(self, number: int) -> None:
        """Nobody waits for this one any more."""
        with self._lock:
            pending = self._pending.pop(number, None)
        if pending is not None:
            self._say(wire.Cancel(number))
            if pending.timer is not None:
                self._loop.call_soon_threadsafe(pending.timer.cancel)

    def give_up_soon(self, number: int) -> None:
        """The same, in the loop's turn: takes no lock, so it may be called where garbage is collected."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.give_up, number)

    def disown(self) -> None:
        """In a process that was forked: the connection is the parent's."""
        if self._channel is not None:
            self._channel.disown()
        self.lost, self._channel, self._lock = True, None, threading.Lock()

    def _send(
        self, number: int, pending: Pending, make: Callable[[int, list[int]], wire.Message], value: Packed
    ) -> None:
        channel = self._channel
        with self._lock:
            if self.lost or channel is None:
                raise Lost(f"the connection to {self._view.worker} is lost")
            received, self._received = self._received, []
            self._pending[number] = pending
        try:
            pending.frame = frame = wire.frame(make(number, received), value, channel.lender, channel.memory)
        except BaseException:
            self._pending.pop(number, None)
            raise
        channel.send(frame)
        other = self._channel
        if other is not None and other is not channel:  # made meanwhile; twice is once
            other.send(frame)

    def _say(self, message: wire.Message) -> None:
        channel = self._channel
        if channel is not None and not self.lost:
            channel.send(wire.frame(message))

    def _limit(self, number: int, timeout: float) -> None:
        def late() -> None:
            with self._lock:
                pending = self._pending.pop(number, None)
            if pending is not None:
                self._say(wire.Cancel(number))
                pending.fail(TimeoutError(f"{pending.worker} has not answered within {timeout:g} s"))

        if (waiting := self._pending.get(number)) is not None:
            waiting.timer = self._loop.call_later(timeout, late)

    # --- answers, in the loop

    def _take(self, arrived: Arrived) -> None:
        message = arrived.message
        if not isinstance(message, wire.Welcome):
            self._futile = 0
        if isinstance(message, wire.Result):
            pending = self._settled(message.id)
            if pending is None:
                return
            if pending.sink is not None:
                pending.sink(None, None, True)
                return
            assert pending.future is not None
            try:
                value = value_of(message, arrived, pending.packages)
            except CodecError as error:
                pending.fail(error)
                return
            with contextlib.suppress(InvalidStateError):
                pending.future.set_result(value)
        elif isinstance(message, wire.Failure):
            if (pending := self._settled(message.id)) is not None:
                pending.fail(failure_of(arrived, pending))
        elif isinstance(message, wire.Item):
            pending = self._pending.get(message.id)
            if pending is not None and pending.sink is not None:
                try:
                    pending.sink(value_of(message, arrived, pending.packages), None, False)
                except CodecError as error:
                    self.give_up(message.id)
                    pending.fail(error)
        elif isinstance(message, wire.Welcome) and not self._welcome.done():
            # Not by its PID: in a namespace the host has another than its node knows. A guest's host is its target.
            if message.worker in (self._view.worker, self._view.target):
                self._welcome.set_result(message)
            else:
                self._welcome.set_exception(Unreachable(f"{message.worker} answers there"))

    def _settled(self, number: int) -> Pending | None:
        """An answer has come: it need not be kept there any longer, which is told with the next call, or soon."""
        with self._lock:
            self._received.append(number)
            many = len(self._received) >= _MANY
            if not self._telling:
                self._telling = True
                self._loop.call_later(_TELL_AFTER_S, self._tell_received)
            pending = self._pending.pop(number, None)
        if pending is not None and pending.timer is not None:
            pending.timer.cancel()
        if many:
            self._tell(wire.Received)
        return pending

    def _tell_received(self) -> None:
        self._telling = False
        self._tell(wire.Received)

    def _tell(self, kind: type[wire.Received]) -> None:
        with self._lock:
            received, self._received = self._received, []
        if received:
            self._say(kind(received))

    # --- loss

    def _gone(self, channel: Channel, why: str) -> None:
        if not self._welcome.done():  # who opens it hears of it
            self._welcome.set_exception(Unreachable(why))
            self._welcome.exception()
            return
        if channel is not self._channel:
            return
        self._futile = self._futile + 1 if self._loop.time() - self._opened < _BRIEF_S else 0
        with self._lock:
            self.lost = True
            self._channel = None
        self._losing = self._loop.create_task(self._settle(why))

    async def _settle(self, why: str) -> None:
        """Have its calls fail, or be answered by another connection; streams fail in both cases."""
        streams = {number: pending for number, pending in list(self._pending.items()) if pending.sink is not None}
        for number in streams:
            self._pending.pop(number, None)  # what came while nobody listened is lost
        if self._futile >= _FUTILE:  # it is what is sent that ends it: more memory than there is, say
            self._futile = 0
            lost = f"was lost {_FUTILE} times in a row: {why}"
            loss.fail((self._pending, streams), lambda worker: Unreachable(f"the connection to {worker} {lost}"))
        elif await loss.settled(self._source, self._view, (self._pending, streams), why, self._again):
            for number in streams:
                self._say(wire.Cancel(number))
            loss.fail(
                (streams,), lambda worker: Unreachable(f"the connection to {worker}, and this stream, is lost: {why}")
            )

    async def _again(self) -> bool:
        """Whether another connection could be made, and what is not answered was sent again."""
        try:
            await self.open()
        except Unreachable:
            return False
        for pending in list(self._pending.values()):
            if pending.frame is not None and self._channel is not None:
                self._channel.send(pending.frame)
        return True
