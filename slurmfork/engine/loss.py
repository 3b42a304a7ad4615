"""Losses: what becomes of calls whose connection was lost, by the head's word on their workers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from slurmfork.engine.failures import verdict
from slurmfork.engine.pending import Pending
from slurmfork.engine.source import Source, views_of
from slurmfork.errors import SlurmforkError, WorkerFailed
from slurmfork.messages import WorkerView

PATIENCE_S = 15.0  # for the head to say what became of a worker whose connection was lost
_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5

Calls = dict[int, Pending]


async def settled(
    source: Source, view: WorkerView, calls: Sequence[Calls], why: str, again: Callable[[], Awaitable[bool]]
) -> bool:
    """Whether another connection was made, by ``again``, for those calls whose workers live; the others have failed.

    ``view`` is of the host, as it was when the connection was made.
    """
    loop = asyncio.get_running_loop()
    pause, until = _PAUSE_S, loop.time() + PATIENCE_S
    while any(calls) and loop.time() < until:
        workers = {pending.worker for some in calls for pending in list(some.values())}
        views = await loop.run_in_executor(None, views_of, source, workers)
        for some in calls:
            for number, pending in list(some.items()):
                if pending.worker in views and (error := verdict(pending.worker, views[pending.worker], view)):
                    some.pop(number, None)
                    pending.fail(error)
        if any(calls) and await again():
            return True
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
    fail(calls, lambda worker: WorkerFailed(f"{worker}: {why}, and nobody says what became of it", worker))
    return False


def fail(calls: Sequence[Calls], error: Callable[[str], SlurmforkError]) -> None:
    """Have all of them fail, each with an error that is told its worker."""
    for some in calls:
        for number in list(some):
            if (pending := some.pop(number, None)) is not None:
                pending.fail(error(pending.worker))
