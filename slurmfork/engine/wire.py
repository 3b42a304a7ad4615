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
from slurmfork.errors import CodecError

_PREFIX = struct.Struct("<III4x")  # bytes of the head, bytes of the body, number of buffers
_SHARED = 1 << 63  # in a buffer's size: it is in shared memory
_ROOM = 256 * 1024
_LITTLE = 16 * 1024  # room in which reading goes on before what is unread is moved to the front
_MAPPED = 1024 * 1024  # bytes from which a buffer gets pages of its own, which the kernel clears as they are touched
_MOST_BUFFERS = 1 << 20


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


Said = Hello | Welcome | Call | Create | Remove | Ask | Cancel | More | Received | Result | Item | Failure
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Said).decode


# --- frames out --------------------------------------------------------------------------------------------


class Frame:
    """A frame to be sent, perhaps again: ``parts`` in their order, and descriptors, which it closes when it goes."""

    __slots__ = ("descriptors", "parts", "size")

    def __init__(self, parts: list[bytes], descriptors: Sequence[int] = ()) -> None:
        self.parts = parts
        self.descriptors = descriptors
        self.size = sum(map(len, parts))

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


NOTHING = Packed(b"", ())


def frame(message: Message, value: Packed = NOTHING, *, share: bool = False) -> Frame:
    """What is sent. ``share``: large buffers go by shared memory."""
    head = _encode(message)
    if not value.buffers:
        return Frame([_PREFIX.pack(len(head), len(value.body), 0) + head + value.body])
    sizes: list[int] = []
    inline: list[memoryview] = []
    descriptors: list[int] = []
    for data in value.buffers:
        sharing = share and data.nbytes >= shared.LEAST and len(descriptors) < shared.MOST_DESCRIPTORS
        descriptor = shared.put(data) if sharing else None
        if descriptor is None:
            inline.append(data)
            sizes.append(data.nbytes)
        else:
            descriptors.append(descriptor)
            sizes.append(data.nbytes | _SHARED)
    table = struct.pack(f"<{len(sizes)}Q", *sizes)
    start = _PREFIX.pack(len(head), len(value.body), len(sizes)) + table + head + value.body
    if sum(data.nbytes for data in inline) < _ROOM:
        return Frame([b"".join((start, *inline))], descriptors)
    return Frame([start, *map(bytes, inline)], descriptors)


# --- frames in ---------------------------------------------------------------------------------------------


class Arrived(NamedTuple):
    """A frame that came: buffers are writable, and nobody else's."""

    message: Any
    body: bytes
    buffers: list[Any]


class Inbox:
    """Makes frames of what is read: fill ``room()``, tell ``filled``; ``take`` hears of each frame, in order.

    Large buffers are read to where they stay. ``filled`` raises CodecError for what is no frame.
    """

    def __init__(self, take: Callable[[Arrived], None]) -> None:
        self.descriptors: deque[int] = deque()
        self._take = take
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
            sizes = struct.unpack(f"<{count}Q", (yield from self._bytes(8 * count))) if count else ()
            whole = yield from self._bytes(head + body)
            try:
                message = _decode(memoryview(whole)[:head])
            except msgspec.DecodeError as error:
                raise CodecError(f"what came is no frame: {error}") from None
            buffers = []
            for size in sizes:
                buffers.append(self._shared(size & ~_SHARED) if size & _SHARED else (yield from self._large(size)))
            self._take(Arrived(message, whole[head:], buffers))

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

    def _shared(self, size: int) -> memoryview:
        if not self.descriptors:
            raise CodecError("a descriptor is missing")
        return shared.take(self.descriptors.popleft(), size)
