"""The inbox: makes frames of what is read from a connection; large buffers are read to where they stay."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import msgspec

from slurmfork.engine import wire
from slurmfork.engine.shared import Borrower
from slurmfork.engine.warm import LEAST, Warm
from slurmfork.errors import CodecError

_ROOM = 256 * 1024
_LITTLE = 16 * 1024  # room in which reading goes on before what is unread is moved to the front
_MOST_BUFFERS = 1 << 20


class Arrived(NamedTuple):
    """A frame that came: buffers are writable, and nobody else's."""

    message: Any
    body: bytes
    buffers: list[Any]


class Inbox:
    """Makes frames of what is read: fill ``room()``, tell ``filled``; ``take`` hears of each frame, in order.

    Large buffers are read to where they stay, in ``memory`` if that is given, or are a ``borrower``'s. ``filled``
    raises CodecError for what is no frame.
    """

    def __init__(
        self, take: Callable[[Arrived], None], borrower: Borrower | None = None, memory: Warm | None = None
    ) -> None:
        self._memory = memory
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
            while self._end - self._start < wire.PREFIX.size:
                yield
            head, body, count = wire.PREFIX.unpack_from(self._buffer, self._start)
            self._start += wire.PREFIX.size
            if count > _MOST_BUFFERS:
                raise CodecError("what came is no frame")
            table = (yield from self._bytes(wire.BUFFER.size * count)) if count else b""
            whole = yield from self._bytes(head + body)
            try:
                message = wire.decode(memoryview(whole)[:head])
            except msgspec.DecodeError as error:
                raise CodecError(f"what came is no frame: {error}") from None
            buffers = []
            for size, block in wire.BUFFER.iter_unpack(table):
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
            made = self._fresh(size)
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
        return made if size < LEAST else target

    def _fresh(self, size: int) -> Any:
        if size < LEAST:
            return bytearray(size)
        return self._memory.take(size) if self._memory is not None else mmap.mmap(-1, size, mmap.MAP_PRIVATE)

    def _shared(self, size: int, block: int) -> memoryview:
        if self._borrower is None or (block & 1 and not self.descriptors):
            raise CodecError("shared memory is refused here")
        descriptor = self.descriptors.popleft() if block & 1 else None
        return self._borrower.take(block >> 1, size, descriptor)
