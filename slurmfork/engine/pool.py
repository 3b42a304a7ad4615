"""The connections of this process: one to each host, whoever uses it."""

from __future__ import annotations

import asyncio
import os

from slurmfork.engine.caller import Connection
from slurmfork.engine.source import Source
from slurmfork.messages import WorkerView

_connections: dict[tuple[str, str, int | None], Connection] = {}  # by run, endpoint and PID; used in the background
_opening: dict[tuple[str, str, int | None], asyncio.Future[Connection]] = {}


async def connected(source: Source, view: WorkerView) -> Connection:
    """The connection to a worker's host, which all handles of this process share; in the background loop."""
    key = (source.run_id, view.endpoints[0], view.pid)
    found = _connections.get(key)
    if found is not None and not found.lost:
        return found
    if key not in _opening:
        _opening[key] = asyncio.ensure_future(_open(key, source, view))
    return await asyncio.shield(_opening[key])


async def _open(key: tuple[str, str, int | None], source: Source, view: WorkerView) -> Connection:
    try:
        made = Connection(source, view)
        await made.open()
        _connections[key] = made
        return made
    finally:
        del _opening[key]


def _disown() -> None:
    """A process that was forked makes connections of its own."""
    for connection in _connections.values():
        connection.disown()
    _connections.clear()
    _opening.clear()


os.register_at_fork(after_in_child=_disown)
