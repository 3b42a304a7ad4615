"""Shared memory between the two ends of a connection on one node: large buffers are copied once, and into pages that
are there already.

Each end lends blocks: unnamed files in memory (memfd), whose descriptor is passed when a block is first used and which
both ends keep mapped. A block is lent again when nothing at the other end looks at it any more: getting fresh pages
from the kernel takes several times as long as copying into them. All of it is gone with the last process that has it
open, whoever dies how: nothing is left to remove.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from slurmfork.errors import CodecError

LEAST = 256 * 1024  # bytes; below, two copies through a socket are as quick (scripts/bench --only engine)
MOST_BLOCKS = 64  # of one end of a connection: each is a descriptor in both processes; what is beyond is sent
IDLE_S = 10.0  # after which a block that is not lent is given back to the system
_UNIT = 64 * 1024
_POPULATED = mmap.MAP_SHARED | mmap.MAP_POPULATE  # all pages at once: a fault for each would take many times as long
_STEP = 4 * 1024 * 1024  # bytes copied at once, with the interpreter's lock held

# fcntl's own names for these are not there on all systems.
_ADD_SEALS, _GET_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033), getattr(fcntl, "F_GET_SEALS", 1034)
_SHRINK = 2


class Block:
    """Memory that is lent. ``known``: the other end has it; until then its descriptor goes with it."""

    __slots__ = ("descriptor", "known", "map", "number", "since", "size")

    def __init__(self, number: int, data: memoryview) -> None:
        """Raises OSError. Written, not mapped and copied to: so the kernel neither clears pages nor faults on each."""
        self.number = number
        self.size = -(-data.nbytes // _UNIT) * _UNIT
        self.known = False
        self.since = 0.0
        self.descriptor = os.memfd_create("slurmfork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            rest = data
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
            os.ftruncate(self.descriptor, self.size)
            fcntl.fcntl(self.descriptor, _ADD_SEALS, _SHRINK)
            self.map: mmap.mmap | None = None
        except BaseException:
            os.close(self.descriptor)
            raise

    def fill(self, data: memoryview) -> None:
        """Copy to it; raises OSError."""
        if self.map is None:
            self.map = mmap.mmap(self.descriptor, self.size, flags=_POPULATED)
        with memoryview(self.map) as target:
            for start in range(0, data.nbytes, _STEP):
                part = data[start : start + _STEP]
                target[start : start + part.nbytes] = part

    def close(self) -> None:
        """Let go of it; the other end may still have it."""
        os.close(self.descriptor)
        if self.map is not None:
            with suppress(BufferError):  # a thread is just writing to it: then it goes when that is done
                self.map.close()


class Lender:
    """The blocks that one end of a connection lends. ``lend`` and ``give_back`` are for any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._blocks: dict[int, Block] = {}
        self._free: list[Block] = []
        self._returned: deque[Block] = deque()
        self._last = 0
        self._closed = False

    def lend(self, data: memoryview) -> Block | None:
        """A block that holds ``data`` (plain bytes); None where it has to be sent."""
        with self._lock:
            self._take_back()
            if self._closed:
                return None
            fitting = [block for block in self._free if data.nbytes <= block.size <= 2 * data.nbytes + _UNIT]
            found = min(fitting, key=lambda block: block.size, default=None)
            if found is not None:
                self._free.remove(found)
            elif len(self._blocks) >= MOST_BLOCKS:
                return None
            else:
                self._last += 1
                number = self._last
        try:
            if found is not None:
                found.fill(data)
                return found
            made = Block(number, data)
        except OSError:  # no memory, or no descriptors: sending may still do
            if found is not None:
                self.give_back(found)
            return None
        with self._lock:
            self._blocks[number] = made
            if self._closed:
                self._drop(made)
                return None
        return made

    def give_back(self, block: Block) -> None:
        """It was not used after all. Takes no lock: it is called when garbage is collected, wherever that is."""
        self._returned.append(block)

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            block.since = self._clock()
            self._free.append(block)

    def freed(self, numbers: list[int]) -> None:
        """The other end looks at these no more."""
        with self._lock:
            lent = {block.number for block in self._free}
            for number in numbers:
                if number in self._blocks and number not in lent:
                    self._returned.append(self._blocks[number])
            self._take_back()

    def trim(self) -> list[int]:
        """Give those back to the system that were not lent for a while; their numbers, for the other end."""
        before = self._clock() - IDLE_S
        with self._lock:
            self._take_back()
            idle = [block for block in self._free if block.since <= before]
            for block in idle:
                self._free.remove(block)
                self._drop(block)
        return [block.number for block in idle if block.known]

    @property
    def empty(self) -> bool:
        """Whether it has no block."""
        return not self._blocks

    def close(self) -> None:
        """The connection is over."""
        with self._lock:
            self._closed = True
            for block in list(self._blocks.values()):
                self._drop(block)
            self._free.clear()

    def _drop(self, block: Block) -> None:
        del self._blocks[block.number]
        block.close()


class Borrower:
    """The blocks of the other end. ``over`` is told of each that nobody here looks at any more, from any thread."""

    def __init__(self, over: Callable[[int], None]) -> None:
        self._over = over
        self._maps: dict[int, mmap.mmap] = {}

    def take(self, number: int, size: int, descriptor: int | None) -> memoryview:
        """The bytes of a block, writable, until they are let go; ``descriptor`` of a new one. Raises CodecError."""
        if descriptor is not None:
            self._maps[number] = _mapped(descriptor)
        found = self._maps.get(number)
        if found is None or len(found) < size:
            raise CodecError("there is no such shared memory")
        # All that looks at these bytes, through however many views, has this object alive, and no other has.
        area = (ctypes.c_ubyte * size).from_buffer(found)
        weakref.finalize(area, self._over, number).atexit = False
        return memoryview(area).cast("B")

    def dropped(self, numbers: list[int]) -> None:
        """The other end has given these back to the system."""
        for number in numbers:
            self._maps.pop(number, None)

    def close(self) -> None:
        """The connection is over; what is looked at stays."""
        self._maps.clear()


def _mapped(descriptor: int) -> mmap.mmap:
    try:
        if not fcntl.fcntl(descriptor, _GET_SEALS) & _SHRINK:
            raise CodecError("shared memory that could shrink is refused")
        return mmap.mmap(descriptor, os.fstat(descriptor).st_size, flags=_POPULATED)
    except (OSError, ValueError) as error:
        raise CodecError(f"shared memory cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)
