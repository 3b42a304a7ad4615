"""A channel over a Unix socket. The thread that sends writes by itself what the socket takes, which saves the event
loop's turn; large buffers are in memory that both ends share.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import socket
import struct
import threading
from collections import deque

from slurmfork.engine import wire
from slurmfork.engine.channel import BUFFER, Loser, Piece, Taker, abandon, pieces
from slurmfork.engine.inbox import Arrived, Inbox
from slurmfork.engine.shared import IDLE_S, Borrower, Lender
from slurmfork.engine.warm import Warm
from slurmfork.engine.wire import Frame
from slurmfork.errors import CodecError

log = logging.getLogger(__name__)

_MOST_PARTS = 256  # in one system call
_MOST_BYTES = 1024 * 1024
_ANCILLARY = socket.CMSG_SPACE(4 * 253)
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class UnixChannel:
    """Over a connected Unix socket, which it owns. Made in the loop."""

    memory: Warm | None = None

    def __init__(self, sock: socket.socket, take: Taker, lost: Loser) -> None:
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self.lender: Lender | None = Lender(self._loop.time)
        self._borrower = Borrower(self._let_go)
        self._let_gone: deque[int] = deque()
        self._trimming = False
        self._use = take
        self._inbox = Inbox(self._take, self._borrower)
        self._lock = threading.Lock()
        self._waiting: deque[Piece] = deque()
        self._flush_due = False
        self._blocked = False
        self._closing = False
        self._over = False
        self._loop.add_reader(sock, self._readable)

    def send(self, frame: Frame) -> None:
        """See Channel."""
        with self._lock:
            if self._over:
                return
            self._waiting.extend(pieces(frame))
            if not self._blocked:
                self._write()

    def post(self, frame: Frame) -> None:
        """See Channel."""
        with self._lock:
            if self._over:
                return
            self._waiting.extend(pieces(frame))
            due, self._flush_due = self._flush_due or self._blocked, True
        if not due:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._flush)

    def _flush(self) -> None:
        with self._lock:
            self._flush_due = False
            if not self._over and not self._blocked:
                self._write()

    def _write(self) -> None:
        """Write what the socket takes. With the lock."""
        try:
            while self._waiting:
                self._write_some()
        except (BlockingIOError, InterruptedError):
            self._blocked = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._watch)
        except OSError as error:
            self._fail(str(error))

    def _write_some(self) -> None:
        parts: list[bytes | memoryview] = []
        size = 0
        descriptors = self._waiting[0].descriptors
        for piece in self._waiting:
            if parts and (piece.descriptors or len(parts) >= _MOST_PARTS or size >= _MOST_BYTES):
                break  # descriptors go with the first byte of their frame
            parts.append(piece.part)
            size += len(piece.part)
        if descriptors:
            rights = array.array("i", descriptors)
            sent = self._socket.sendmsg(parts, [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        else:
            sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._waiting[0] = Piece(memoryview(part)[sent:])
                return
            sent -= len(part)
            self._waiting.popleft()

    def _watch(self) -> None:
        with self._lock:
            if not self._over:
                self._loop.add_writer(self._socket, self._writable)

    def _writable(self) -> None:
        with self._lock:
            if self._over:
                return
            self._loop.remove_writer(self._socket)
            self._blocked = False
            self._write()
            done = self._closing and not self._waiting
        if done:
            self._end("closed")

    def _fail(self, why: str) -> None:
        """The socket is broken. With the lock, in any thread."""
        self._waiting.clear()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, why)

    # --- shared memory

    def _take(self, arrived: Arrived) -> None:
        message = arrived.message
        if isinstance(message, wire.Freed):
            assert self.lender is not None
            self.lender.freed(message.blocks)
            if not self._trimming:
                self._trimming = True
                self._loop.call_later(IDLE_S, self._trim)
        elif isinstance(message, wire.Dropped):
            self._borrower.dropped(message.blocks)
        else:
            self._use(arrived)

    def _trim(self) -> None:
        assert self.lender is not None
        if dropped := self.lender.trim():
            self.send(wire.frame(wire.Dropped(dropped)))
        self._trimming = not self._over and not self.lender.empty
        if self._trimming:
            self._loop.call_later(IDLE_S, self._trim)

    def _let_go(self, block: int) -> None:
        """Nobody here looks at a block any more. Takes no lock: garbage is collected wherever it falls."""
        self._let_gone.append(block)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._tell_let_go)

    def _tell_let_go(self) -> None:
        blocks = []
        while self._let_gone:
            blocks.append(self._let_gone.popleft())
        if blocks:
            self.send(wire.frame(wire.Freed(blocks)))

    # --- reading, and the end

    def _readable(self) -> None:
        for _ in range(64):  # then others have their turn
            room = self._inbox.room()
            try:
                count, ancillary, _flags, _ = self._socket.recvmsg_into([room], _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._end(str(error))
                return
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    self._inbox.descriptors.extend(array.array("i", data[: len(data) - len(data) % 4]))
            if not count:
                self._end("the other side is gone")
                return
            try:
                self._inbox.filled(count)
            except CodecError as error:
                self._end(str(error))
                return
            except Exception as error:  # a fault of ours must not take the others' connections along
                log.exception("a connection is given up")
                self._end(str(error))
                return
            if self._over or count < len(room):
                return

    def disown(self) -> None:
        """See Channel."""
        abandon(self._socket)

    def close(self) -> None:
        """See Channel."""
        with self._lock:
            self._closing = True
            wait = bool(self._waiting) and not self._over
        if not wait:
            self._end("closed")

    def _end(self, why: str) -> None:
        with self._lock:
            if self._over:
                return
            self._over = True
            self._waiting.clear()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._inbox.close()
        self._borrower.close()
        if self.lender is not None:
            self.lender.close()
        self._lost(why)


def peer_uid(sock: socket.socket) -> int:
    """The user id at the other end of a Unix socket, by the kernel's word."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid
