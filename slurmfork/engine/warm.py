"""Warm memory: large buffers that a connection has used, and uses again when nobody looks at them any more.

Fresh pages from the kernel take many times as long as copying to them. What is not used for a while is given back.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress

from slurmfork.engine.shared import IDLE_S

LEAST = 1024 * 1024  # bytes; smaller ones come from the heap, which is warm by itself
_UNIT = 64 * 1024


class Warm:
    """Memory of one connection. ``take`` and ``copy`` are for any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._free: list[tuple[float, mmap.mmap]] = []
        self._returned: deque[mmap.mmap] = deque()
        self._trimming = False

    def take(self, size: int) -> memoryview:
        """So many bytes, whatever they hold: writable, and nobody else's until all views of them are gone.

        Raises OSError, MemoryError or OverflowError where there is no memory.
        """
        with self._lock:
            self._take_back()
            fitting = [entry for entry in self._free if size <= len(entry[1]) <= 2 * size + _UNIT]
            found = min(fitting, key=lambda entry: len(entry[1]), default=None)
            if found is not None:
                self._free.remove(found)
        area = found[1] if found is not None else mmap.mmap(-1, -(-size // _UNIT) * _UNIT, mmap.MAP_PRIVATE)
        looked_at = (ctypes.c_ubyte * size).from_buffer(area)  # all views have this object alive, and no other has
        weakref.finalize(looked_at, self._let_go, area).atexit = False
        return memoryview(looked_at).cast("B")

    def copy(self, data: memoryview) -> bytes | memoryview:
        """The same bytes, nobody else's."""
        if data.nbytes < LEAST:
            return bytes(data)
        made = self.take(data.nbytes)
        made[:] = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        return made

    def _let_go(self, area: mmap.mmap) -> None:
        """Takes no lock: garbage is collected wherever it falls."""
        self._returned.append(area)
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._trim_later)

    def _take_back(self) -> None:
        while self._returned:
            self._free.append((self._loop.time(), self._returned.popleft()))

    def _trim_later(self) -> None:
        if not self._trimming:
            self._trimming = True
            self._loop.call_later(IDLE_S, self._trim)

    def _trim(self) -> None:
        self._trimming = False
        with self._lock:
            before = self._loop.time() - IDLE_S
            self._free = [entry for entry in self._free if entry[0] > before]
            self._take_back()
            more = bool(self._free)
        if more:
            self._trim_later()
