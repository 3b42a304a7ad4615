"""Streams: what a generator in an engine yields, item by item, on the caller's side. The engine runs ahead a little."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable
from typing import Any

WINDOW = 32  # items that an engine may be ahead

# Begins a stream whose items the given sink hears; returns how to let more come, and how to give up.
Begin = Callable[[Callable[[Any, "Exception | None", bool], None]], "tuple[Callable[[int], None], Callable[[], None]]"]
_Entry = tuple[Any, "Exception | None", bool]


class _Credit:
    """Lets more items come each time that half of the window was used."""

    def __init__(self, more: Callable[[int], None]) -> None:
        self._more = more
        self._used = 0

    def use(self) -> None:
        self._used += 1
        if self._used >= WINDOW // 2:
            used, self._used = self._used, 0
            self._more(used)


class Stream:
    """An iterator over a generator in an engine. ``close`` ends that early; so does leaving a ``with``."""

    def __init__(self, begin: Begin) -> None:
        self._queue = items = queue.SimpleQueue[_Entry]()
        # Who sends must not hold this object: that nobody else does any more is what ends the generator.
        more, self._give_up = begin(lambda *entry: items.put(entry))
        self._credit = _Credit(more)
        self._over = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if self._over:
            raise StopIteration
        value, error, over = self._queue.get()
        if over:
            self._over = True
            if error is not None:
                raise error
            raise StopIteration
        self._credit.use()
        return value

    def close(self) -> None:
        """Have the generator closed; harmless when repeated, and at its end."""
        if not self._over:
            self._over = True
            self._give_up()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_over"):
            self.close()


class AsyncStream:
    """The same for ``async for``, in the event loop that it was made in."""

    def __init__(self, begin: Begin) -> None:
        loop = asyncio.get_running_loop()
        self._queue = items = asyncio.Queue[_Entry]()
        more, self._give_up = begin(lambda *entry: _tell(loop, items, entry))
        self._credit = _Credit(more)
        self._over = False

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Any:
        if self._over:
            raise StopAsyncIteration
        value, error, over = await self._queue.get()
        if over:
            self._over = True
            if error is not None:
                raise error
            raise StopAsyncIteration
        self._credit.use()
        return value

    async def aclose(self) -> None:
        """Have the generator closed; harmless when repeated, and at its end."""
        if not self._over:
            self._over = True
            self._give_up()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if hasattr(self, "_over") and not self._over:
            self._give_up()


def _tell(loop: asyncio.AbstractEventLoop, items: asyncio.Queue[_Entry], entry: _Entry) -> None:
    try:
        loop.call_soon_threadsafe(items.put_nowait, entry)
    except RuntimeError:  # the loop is closed: nobody listens
        return
