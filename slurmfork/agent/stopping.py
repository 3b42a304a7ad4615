"""Stopping: a worker's process is asked to end, then what it left is, then all is killed that is still there.

It does not know what a worker is: ``look`` says who is meant. It is over the moment that nobody is left, and
never later than its bounds; what would not die is described.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from slurmfork.process import Identity, alive, describe, send

KILL_BOUND_S = 5.0
_ROUND_S = 0.05
_QUICK_ROUNDS = 3
_FREEZE_ROUNDS = 20
_POLL_S = 0.005


@dataclass
class Outcome:
    """How it went. ``killed``: SIGKILL was needed; ``survivors`` describes who did not die even of that."""

    killed: bool = False
    survivors: list[str] = field(default_factory=list)


class Watch:
    """Tells when processes have ended, by a pidfd each in the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open: dict[Identity, int] = {}
        self._polling: asyncio.TimerHandle | None = None
        self._moved = asyncio.Event()
        self.last_end = self._loop.time()

    def add(self, one: Identity) -> bool:
        """Watch a process too; False if it has ended already."""
        if one in self._open:
            return True
        try:
            descriptor = os.pidfd_open(one.pid)
        except ProcessLookupError:
            return False
        except (OSError, AttributeError):  # a kernel before 5.3, or no descriptor left
            descriptor = -1
        if not alive(one):
            if descriptor >= 0:
                os.close(descriptor)
            return False
        self._open[one] = descriptor
        if descriptor >= 0:
            self._loop.add_reader(descriptor, self._ended, one)
        elif self._polling is None:
            self._polling = self._loop.call_later(_POLL_S, self._poll)
        return True

    def _poll(self) -> None:
        unpinned = [one for one, descriptor in self._open.items() if descriptor < 0]
        for one in unpinned:
            if not alive(one):
                self._ended(one)
        self._polling = self._loop.call_later(_POLL_S, self._poll) if unpinned else None

    def _ended(self, one: Identity) -> None:
        self._forget(one)
        self.last_end = self._loop.time()
        self._moved.set()

    def _forget(self, one: Identity) -> None:
        descriptor = self._open.pop(one)
        if descriptor >= 0:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def wake(self) -> None:
        """Have whoever waits look at the clock again."""
        self._moved.set()

    async def quiet(self, deadline: Callable[[], float]) -> None:
        """Wait until none of those watched is left, or until ``deadline()``, which may move while we wait."""
        while self._open and (rest := deadline() - self._loop.time()) > 0:
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), rest)
            except asyncio.TimeoutError:
                return

    def close(self) -> None:
        """Watch nobody any more."""
        for one in list(self._open):
            self._forget(one)
        if self._polling is not None:
            self._polling.cancel()


class Stopping:
    """One stop. ``look(newer_than)`` lists who is left, not earlier than at that time of the event loop.

    ``leader`` alone is asked first: what it started is its own to end, or to use for a last checkpoint. When it
    is gone, the rest is asked; at the end of the grace all that is left is killed.
    """

    def __init__(
        self,
        look: Callable[[float], Iterable[Identity]],
        *,
        leader: Identity | None,
        signum: int,
        grace: float,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._look_up = look
        self._leader = leader
        self._signum = signum
        self._deadline = self._loop.time() + grace
        self._bound = KILL_BOUND_S
        self._left: list[Identity] = []
        self._asked: set[Identity] = set()
        self._watch = Watch()

    def hasten(self, grace: float, bound: float = KILL_BOUND_S) -> None:
        """Leave it no more than ``grace`` seconds from now, and ``bound`` after SIGKILL."""
        self._deadline = min(self._deadline, self._loop.time() + grace)
        self._bound = min(self._bound, bound)
        self._watch.wake()

    async def run(self) -> Outcome:
        """Stop them all."""
        try:
            if self._leader is not None and self._watch.add(self._leader):
                self._ask(self._leader)
                await self._watch.quiet(lambda: self._deadline)
            if await self._ask_the_rest():
                return Outcome()
            return await self._kill()
        finally:
            self._watch.close()

    async def _ask_the_rest(self) -> bool:
        """Ask each as it is found; True when nobody is left before the grace is over."""
        rounds = 0
        while self._look(self._watch.last_end):
            if self._loop.time() >= self._deadline:
                return False
            for one in self._left:
                self._ask(one)
            await self._watch.quiet(lambda: self._deadline)
            rounds += 1
            if rounds > _QUICK_ROUNDS:  # it answers by forking: no need to run after it until it is to be killed
                await asyncio.sleep(_ROUND_S)
        return True

    def _look(self, newer_than: float) -> bool:
        """Note who is left, by a look that is newer than the last exit, and than the end of the grace.

        True also where somebody was found but is gone before he could be watched: he may have left another.
        """
        if self._loop.time() >= self._deadline:
            newer_than = max(newer_than, self._deadline)
        found = list(self._look_up(newer_than))
        self._left = [one for one in found if self._watch.add(one)]
        return bool(found)

    def _ask(self, one: Identity) -> None:
        if one not in self._asked:
            self._asked.add(one)
            send(one, self._signum)
            send(one, signal.SIGCONT)  # who is stopped hears nothing else

    async def _kill(self) -> Outcome:
        """SIGKILL, until a look finds nobody, for as long as the bound allows."""
        limit = self._loop.time() + self._bound
        some, rounds = True, 0
        while some and self._loop.time() < limit:
            if rounds:
                self._freeze(limit)
            for one in self._left:
                send(one, signal.SIGKILL)
            end = min(limit, self._loop.time() + _ROUND_S)
            await self._watch.quiet(lambda until=end: until)  # type: ignore[misc]
            await asyncio.sleep(0)
            some = self._look(end if self._loop.time() >= end else self._watch.last_end)
            rounds += 1
        return Outcome(killed=True, survivors=[describe(one) for one in self._left])

    def _freeze(self, limit: float) -> None:
        """Who forks faster than it is killed is stopped first: what is stopped has no more children."""
        seen: set[Identity] = set()
        for _ in range(_FREEZE_ROUNDS):
            new = [one for one in self._left if one not in seen and send(one, signal.SIGSTOP)]
            if (not new and seen) or self._loop.time() >= limit:
                break
            seen.update(new)
            self._look(self._loop.time())
        self._left = list(seen.union(self._left))
