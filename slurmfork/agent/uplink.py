"""The agent's way to its head: one connection under mutual TLS, found again for a while when it is lost.

What is told while it is down is lost: whoever joins again says everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from slurmfork.errors import Unreachable
from slurmfork.link import Handler, Link
from slurmfork.orders import Join, Welcome

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 10.0
JOIN_TIMEOUT_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_FEWEST_TRIES = 3  # a node that was frozen for longer than its lease gets a chance all the same


class Uplink:
    """Connects to one of ``heads`` and joins. ``join(address)`` makes what is said first.

    ``ahead``: seconds by which this machine's clock is surely ahead of the head's, negative where it is behind.
    """

    def __init__(
        self,
        heads: Sequence[tuple[str, int]],
        context: ssl.SSLContext,
        server_name: str,
        *,
        join: Callable[[str], Join],
        handler: Handler,
    ) -> None:
        self._heads = heads
        self._context = context
        self._server_name = server_name
        self._join = join
        self._handler = handler
        self._link: Link | None = None
        self.ahead = 0.0

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self._link is not None and not self._link.closed

    async def connect(self, patience: float) -> Welcome:
        """Join the head, trying for ``patience`` seconds; raises Unreachable, or Refused if it says no."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        pause, tries = _FIRST_PAUSE_S, 0
        while True:
            for host, port in self._heads:
                try:
                    return await self._connect(host, port)
                except (OSError, asyncio.TimeoutError, Unreachable) as error:
                    log.info("no head at %s port %d: %s", host, port, error or type(error).__name__)
            tries += 1
            if loop.time() + pause > deadline and tries >= _FEWEST_TRIES:
                raise Unreachable(f"no head answered within {patience:g} s")
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    async def _connect(self, host: str, port: int) -> Welcome:
        link = Link(self._handler)
        loop = asyncio.get_running_loop()
        await asyncio.wait_for(
            loop.create_connection(lambda: link, host, port, ssl=self._context, server_hostname=self._server_name),
            CONNECT_TIMEOUT_S,
        )
        asked = time.time()
        try:
            welcome = await link.ask("join", self._join(link.fact("socket").getsockname()[0]), Welcome, JOIN_TIMEOUT_S)
        except BaseException:
            link.close()
            raise
        self._link = link
        self.ahead = 0.0 if welcome.time is None else _ahead(asked, welcome.time, time.time())
        log.info("joined the head at %s port %d", host, port)
        return welcome

    async def lost(self) -> None:
        """Wait until the connection is gone."""
        if self._link is not None:
            await self._link.ended()

    def tell(self, op: str, body: Any) -> None:
        """Send a notice; lost where there is no connection."""
        if self._link is not None:
            self._link.tell(op, body)

    async def ask(self, op: str, body: Any, kind: type[T], timeout: float | None = None) -> T:
        """Ask the head; raises Refused, Unreachable, asyncio.TimeoutError."""
        if self._link is None:
            raise Unreachable("this agent has no connection to its head")
        return await self._link.ask(op, body, kind, timeout)

    async def close(self, timeout: float) -> None:
        """Let out what was said last, and end the connection."""
        if self._link is None:
            return
        self._link.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._link.ended(), timeout)


def _ahead(asked: float, theirs: float, answered: float) -> float:
    """How far ours is ahead at least: the head looked at its clock at some moment between our two looks."""
    return max(0.0, asked - theirs) or min(0.0, answered - theirs)
