"""Preflight, on the node: what is not as a run would have it, looked at before anything is started.

Every look is bounded, in a thread of its own, and in words. Nothing is changed, but what runs that are over left
here is ended (``agent.leftovers``).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping

from slurmfork.agent import holders, leftovers
from slurmfork.agent.node import Node
from slurmfork.agent.starter import Starter
from slurmfork.orders import Finding

log = logging.getLogger(__name__)

SWEEP_LIMIT_S = 7.0
DEVICES_LIMIT_S = 10.0
PLACES_LIMIT_S = 10.0
SCRATCH = 64 << 20  # bytes that are to be free
MEMORY = 16 << 20
NOTICED_S, SERIOUS_S = 5.0, 300.0  # beyond these, logs mislead, and certificates are not valid yet


async def preflight(
    node: Node,
    starter: Starter,
    ahead: Callable[[], float],
    sweep: Callable[[str], list[Finding]] = leftovers.sweep,
) -> list[Finding]:
    """All that is found. ``ahead``: seconds by which this clock is ahead of the head's, known once it has answered.

    ``sweep`` ends what other runs left here, and tells.
    """
    loop = asyncio.get_running_loop()

    async def processes() -> list[Finding]:
        sweeping = loop.run_in_executor(None, sweep, node.run_id)
        found = await _bounded("leftovers", sweeping, SWEEP_LIMIT_S)
        return found + await _bounded("devices", holders.look(node, starter), DEVICES_LIMIT_S)

    looking = loop.run_in_executor(None, places, node.environment)
    found = await asyncio.gather(processes(), _bounded("scratch", looking, PLACES_LIMIT_S))
    return [*found[0], *found[1], *clock(ahead())]


async def _bounded(kind: str, look: Awaitable[list[Finding]], limit: float) -> list[Finding]:
    """What a look finds, or that it did not come to an end; a thread that hangs is left to itself."""
    task = asyncio.ensure_future(look)
    await asyncio.wait([task], timeout=limit)
    if not task.done():
        task.cancel()
        return [Finding(kind=kind, text=f"{kind}: could not be looked at within {limit:g} s: a file system hangs")]
    if error := task.exception():
        log.error("preflight: %s", kind, exc_info=error)
        return [Finding(kind=kind, text=f"{kind}: could not be looked at: {error}")]
    return task.result()


def places(environment: Mapping[str, str]) -> list[Finding]:
    """What is wrong with the places for temporary files and for shared memory."""
    found = []
    for path in dict.fromkeys(["/tmp", environment.get("TMPDIR") or "/tmp"]):
        if fault := _fault(path, SCRATCH):
            found.append(Finding(kind="scratch", serious=True, text=f"{path} {fault}"))
    if fault := _fault("/dev/shm", MEMORY):
        found.append(Finding(kind="shm", text=f"/dev/shm {fault}"))
    return found


def _fault(path: str, least: int) -> str:
    if not os.path.isdir(path):  # noqa: PTH112 (light)
        return "is missing"
    if not os.access(path, os.W_OK | os.X_OK):
        return "cannot be written to"
    room = os.statvfs(path)
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < least:  # without blocks: it has no limit
        return f"is full: {free >> 20} MiB free"
    return "is full: no inodes free" if room.f_files and not room.f_favail else ""


def clock(ahead: float) -> list[Finding]:
    """What is wrong with the clock."""
    if abs(ahead) <= NOTICED_S:
        return []
    where = "ahead of" if ahead > 0 else "behind"
    text = f"its clock is {abs(ahead):.0f} s {where} the head's"
    return [Finding(kind="clock", serious=abs(ahead) > SERIOUS_S, text=text)]
