"""Frames: how messages between callers and hosts lie on a connection, and what they are.

A frame is a fixed prefix, the sizes of its buffers, a head (a small struct below), a body (a value, see
``engine.codec``) and the buffers. A buffer in shared memory is not on the connection, its descriptor comes along.
A frame owns its bytes: once made, nothing that the caller or an engine does to its arrays changes it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from slurmfork.engine import shared
from slurmfork.engine.codec import Packed
from slurmfork.engine.shared import Block, Borrower, Lender
from slurmfork.errors import CodecError

_PREFIX = struct.Struct("<III4x")  # bytes of the head, bytes of the body, number of buffers
_BUFFER = struct.Struct("<QQ")  # its bytes; 0, or the number of a block of shared memory, doubled, and 1 if it is new
_ROOM = 256 * 1024
_LITTLE = 16 * 1024  # room in which reading goes on before what is unread is moved to the front
_MAPPED = 1024 * 1024  # bytes from which a buffer gets pages of its own, which the kernel clears as they are touched
_MOST_BUFFERS = 1 << 20
_MOST_DESCRIPTORS = 64  # with one frame; the kernel takes 253


# --- what is said ------------------------------------------------------------------------------------------


class Message(Struct, array_like=True, tag_field="kind", gc=False):
    """Base of what is said."""


class Hello(Message, tag=1):
    """Caller to host, first: the run that it means, and its session, which outlives a lost connection."""

    run_id: str
    session: str


class Welcome(Message, tag=2):
    """Host to caller, in answer: who it is."""

    worker: str
    pid: int


class Call(Message, tag=3):
    """Caller to host: call ``method`` of ``engine`` of ``worker``; the body is [args, kwargs].

    An empty engine is the worker's own. ``window``: so many items of a stream may come before more is asked for;
    0: no stream. ``received``: answers that have arrived, and need be kept no longer.
    """

    id: int
    worker: str
    engine: str
    method: str
    pickled: bool
    window: int
    received: list[int]


class Create(Message, tag=4):
    """Caller to host: make an engine; the body is [args, kwargs]. ``path`` is ``package.module:Class``.

    ``pickle``: whether pickled calls are taken, for a worker's own engine; further ones do as that does.
    """

    id: int
    worker: str
    engine: str
    path: str
    pickle: bool


class Remove(Message, tag=5):
    """Caller to host: close an engine, and forget it."""

    id: int
    worker: str
    engine: str


class Ask(Message, tag=6):
    """Caller to host: how it is; answered at once, whatever its engines do."""

    id: int


class Cancel(Message, tag=7):
    """Caller to host: nobody waits for this call any more."""

    id: int


class More(Message, tag=8):
    """Caller to host: so many more items of this stream may come."""

    id: int
    items: int


class Received(Message, tag=9):
    """Caller to host: answers that have arrived, where no call is there to tell it."""

    ids: list[int]


class Result(Message, tag=10):
    """Host to caller: what the method returned, in the body; of a stream, its end."""

    id: int
    pickled: bool


class Item(Message, tag=11):
    """Host to caller: the next of a stream, in the body."""

    id: int
    pickled: bool


class Failure(Message, tag=12):
    """Host to caller: why there is no result; the body is as ``engine.failures`` has it."""

    id: int


class Freed(Message, tag=13):
    """Both ways: nobody here looks at these blocks of yours any more."""

    blocks: list[int]


class Dropped(Message, tag=14):
    """Both ways: these blocks of mine will not be used again."""

    blocks: list[int]


_Asked = Hello | Call | Create | Remove | Ask | Cancel | More | Received
_Answered = Welcome | Result | Item | Failure
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Asked | _Answered | Freed | Dropped).decode


# --- frames out --------------------------------------------------------------------------------------------


class Frame:
    """A frame to be sent, perhaps again: ``parts`` in their order, and the blocks of ``lender`` that it refers to."""

    __slots__ = ("blocks", "lender", "lent", "parts", "size")

    def __init__(self, parts: list[bytes], blocks: Sequence[Block] = (), lender: Lender | None = None) -> None:
        self.parts = parts
        self.blocks = blocks
        self.lender = lender
        self.lent = bool(blocks)  # then it can be sent but once: what it refers to is used again
        self.size = sum(map(len, parts))

    def hand_over(self) -> list[int]:
        """It is being sent: the blocks are the other end's now. The descriptors of those that it does not know."""
        new = [block.descriptor for block in self.blocks if not block.known]
        for block in self.blocks:
            block.known = True
        self.blocks = ()
        return new

    def __del__(self) -> None:
        for block in self.blocks:
            assert self.lender is not None
            self.lender.give_back(block)


NOTHING = Packed(b"", ())


def frame(message: Message, value: Packed = NOTHING, lender: Lender | None = None) -> Frame:
    """What is sent; large buffers go by shared memory where there is a ``lender``."""
    head = _encode(message)
    if not value.buffers:
        return Frame([_PREFIX.pack(len(head), len(value.body), 0) + head + value.body])
    table: list[bytes] = []
    inline: list[memoryview] = []
    blocks: list[Block] = []
    for data in value.buffers:
        sharing = lender is not None and data.nbytes >= shared.LEAST and len(blocks) < _MOST_DESCRIPTORS
        block = lender.lend(data) if lender is not None and sharing else None
        if block is None:
            inline.append(data)
            table.append(_BUFFER.pack(data.nbytes, 0))
        else:
            blocks.append(block)
            table.append(_BUFFER.pack(data.nbytes, block.number << 1 | (not block.known)))
    start = b"".join((_PREFIX.pack(len(head), len(value.body), len(table)), *table, head, value.body))
    if sum(data.nbytes for data in inline) < _ROOM:
        return Frame([b"".join((start, *inline))], blocks, lender)
    return Frame([start, *map(bytes, inline)], blocks, lender)


# --- frames in ---------------------------------------------------------------------------------------------


class Arrived(NamedTuple):
    """A frame that came: buffers are writable, and nobody else's."""

    message: Any
    body: bytes
    buffers: list[Any]


class Inbox:
    """Makes frames of what is read: fill ``room()``, tell ``filled``; ``take`` hears of each frame, in order.

    Large buffers are read to where they stay, or are a ``borrower``'s. ``filled`` raises CodecError for what is no
    frame.
    """

    def __init__(self, take: Callable[[Arrived], None], borrower: Borrower | None = None) -> None:
        self.descriptors: deque[int] = deque()
        self._take = take
        self._borrower = borrower
        self._buffer = bytearray(_ROOM)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._aside: memoryview | None = None  # what is read next goes there
        self._reading = self._frames()
        next(self._reading)

    def room(self) -> memoryview:
        """Where to read to."""
        if self._aside is not None:
            return self._aside
        if self._start == self._end:
            self._start = self._end = 0
        elif _ROOM - self._end < _LITTLE:
            unread = self._end - self._start
            self._buffer[:unread] = self._buffer[self._start : self._end]
            self._start, self._end = 0, unread
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """So many bytes were read there."""
        if self._aside is None:
            self._end += count
        else:
            self._aside = self._aside[count:] if count < len(self._aside) else None
            if self._aside is not None:
                return
        next(self._reading)

    def close(self) -> None:
        """Let go of descriptors that no frame has taken."""
        while self.descriptors:
            os.close(self.descriptors.popleft())

    def _frames(self) -> Generator[None, None, None]:
        while True:
            while self._end - self._start < _PREFIX.size:
                yield
            head, body, count = _PREFIX.unpack_from(self._buffer, self._start)
            self._start += _PREFIX.size
            if count > _MOST_BUFFERS:
                raise CodecError("what came is no frame")
            table = (yield from self._bytes(_BUFFER.size * count)) if count else b""
            whole = yield from self._bytes(head + body)
            try:
                message = _decode(memoryview(whole)[:head])
            except msgspec.DecodeError as error:
                raise CodecError(f"what came is no frame: {error}") from None
            buffers = []
            for size, block in _BUFFER.iter_unpack(table):
                buffers.append(self._shared(size, block) if block else (yield from self._large(size)))
            self._take(Arrived(message, whole[head:], buffers))
            del message, whole, buffers  # nothing of a frame is kept until the next one comes

    def _bytes(self, count: int) -> Generator[None, None, bytes]:
        if self._end - self._start >= count:
            self._start += count
            return bytes(self._view[self._start - count : self._start])
        return bytes((yield from self._large(count)))

    def _large(self, size: int) -> Generator[None, None, Any]:
        try:
            made: Any = bytearray(size) if size < _MAPPED else mmap.mmap(-1, size, mmap.MAP_PRIVATE)
        except (OSError, MemoryError, OverflowError) as error:
            raise CodecError(f"no memory for {size} bytes: {error}") from None
        target = memoryview(made)
        here = min(size, self._end - self._start)
        target[:here] = self._view[self._start : self._start + here]
        self._start += here
        if here < size:
            self._aside = target[here:]
            while self._aside is not None:
                yield
        return made if size < _MAPPED else target

    def _shared(self, size: int, block: int) -> memoryview:
        if self._borrower is None or (block & 1 and not self.descriptors):
            raise CodecError("shared memory is refused here")
        descriptor = self.descriptors.popleft() if block & 1 else None
        return self._borrower.take(block >> 1, size, descriptor)
