"""How many processes are ended at once so that none escapes by forking: asked, frozen, killed, counted.

Guardian and sweep end things this way. It knows nothing of runs: whom to end is the caller's to say.
Light like ``slurmfork.process``, and for the same reason.
"""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from slurmfork.process import Identity, alive, describe, has_pidfd, send


class Outcome(NamedTuple):
    """What ``end_all`` did: descriptions of what is gone now, and who would not die."""

    ended: list[str]
    survivors: list[Identity]


def wait_gone(identities: Iterable[Identity], timeout: float) -> list[Identity]:
    """Wait until all have exited, for ``timeout`` seconds at most; returns those that still run."""
    deadline = time.monotonic() + timeout
    return [one for one in identities if not _await_end(one, deadline)]


def _await_end(identity: Identity, deadline: float) -> bool:
    if not has_pidfd():
        return _poll_end(identity, deadline)
    try:
        descriptor = os.pidfd_open(identity.pid)
    except OSError:
        return _poll_end(identity, deadline)
    try:
        if not alive(identity):
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(descriptor)


def _poll_end(identity: Identity, deadline: float) -> bool:
    pause = 0.001
    while alive(identity):
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 2, 0.05)
    return True


def end_all(
    find: Callable[[], Iterable[Identity]],
    *,
    grace: float,
    bound: float,
    clear: Callable[[], bool] = lambda: True,
) -> Outcome:
    """End all that ``find`` yields: SIGTERM, ``grace`` seconds, then SIGKILL until two looks find nothing.

    ``clear`` may know better than two looks. Gives up ``bound`` seconds after the first SIGKILL.
    """
    told: dict[Identity, str] = {}
    # All are known before any is asked: who ends at once takes what lies below out of sight.
    first = _tell(list(find()), told, signal.SIGTERM, signal.SIGCONT)
    wait_gone(first, grace)
    deadline = time.monotonic() + bound
    empty = 0
    while (empty < 2 or not clear()) and time.monotonic() < deadline:
        with _undisturbed():
            killed = _kill_round(find, told, deadline)
        empty = 0 if killed else empty + 1
        wait_gone(killed, min(0.5, max(0.0, deadline - time.monotonic())))
    survivors = [one for one in told if alive(one)]
    return Outcome([text for one, text in told.items() if one not in survivors], survivors)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off what ends this process: between freezing and killing, it would leave the frozen behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_round(find: Callable[[], Iterable[Identity]], told: dict[Identity, str], deadline: float) -> set[Identity]:
    """Freeze each process the moment that it is found, look again until none is new, and kill them all.

    What is frozen neither forks nor answers for others, so what lies below it cannot change any more.
    """
    frozen: set[Identity] = set()
    while new := _tell((one for one in find() if one not in frozen), told, signal.SIGSTOP):
        frozen.update(new)
        if time.monotonic() > deadline:
            break
    _tell(frozen, told, signal.SIGKILL)
    return frozen


def _tell(those: Iterable[Identity], told: dict[Identity, str], *signums: int) -> list[Identity]:
    """Signal each as it comes, and note in ``told`` what it is; returns them."""
    signalled = []
    for one in those:
        for signum in signums:
            send(one, signum)
        if one not in told:
            told[one] = describe(one)
        signalled.append(one)
    return signalled
