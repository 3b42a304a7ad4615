"""Once: requests remembered by their id, so that one that is asked twice is done once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from slurmfork.errors import Refused

T = TypeVar("T")


class Once:
    """Remembers requests by their id, so that one that is asked twice is done once."""

    def __init__(self, kept: int = 4096) -> None:
        self._kept = kept
        self._seen: dict[str, tuple[object, asyncio.Future[Any]]] = {}

    async def run(self, request_id: str, request: object, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of ``work()``, which is begun only the first time; raises Refused for another's id."""
        if request_id in self._seen:
            future: asyncio.Future[T]
            first, future = self._seen[request_id]
            if first != request:
                raise Refused(f"request id {request_id} was used for another request", "conflict")
        else:
            future = asyncio.ensure_future(work())
            self._seen[request_id] = (request, future)
            while len(self._seen) > self._kept:
                self._seen.pop(next(iter(self._seen)))
        return await asyncio.shield(future)
