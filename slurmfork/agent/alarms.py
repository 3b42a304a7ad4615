"""Alarms: what tells an agent from outside that it has to go: a signal, or the death of its guardian.

Only hears and says so; what follows is the agent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from slurmfork import prctl, process

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

HOLDER_GONE = (
    "what had started this node's guardian is gone (slurmstepd, the launcher, or on Ray the actor or the raylet)"
)

_PF_EXITING = 0x4  # linux/sched.h
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)

Told = Callable[[str, int, bool], None]  # why to end, the exit status, and whether what the agent needs is gone


def listen(guardian_pid: int, told: Told, *, pass_on: Callable[[int], None], reap: Callable[[], None]) -> None:
    """Hear of signals from now on: ``told`` to end, ``pass_on`` of those for workers.

    The guardian, which asks the kernel to be told of its parent's death, passes that on as SIGTERM, too.
    """
    loop = asyncio.get_running_loop()
    holder = process.parent(guardian_pid)

    def ends(number: signal.Signals) -> None:
        if process.parent(guardian_pid) not in (0, holder) or _dying(holder):
            told(HOLDER_GONE, 128 + number, True)
        else:
            told(f"{number.name} (scancel, a time limit, or somebody's kill)", 128 + number, False)

    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # a failed write is an error, no reason to die
        signal.signal(number, signal.SIG_IGN)
    # uvloop keeps SIGCHLD from add_signal_handler, but runs a plain handler as soon as the signal comes.
    signal.signal(signal.SIGCHLD, lambda number, frame: loop.call_soon_threadsafe(reap))
    for number in ENDING_SIGNALS:
        loop.add_signal_handler(number, ends, number)
    for number in PASSED_ON:
        loop.add_signal_handler(number, pass_on, number)


def _dying(pid: int) -> bool:
    """Whether a process has been killed. Its threads end one by one, and of the first its children hear already."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        flags = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[6])
    except (OSError, IndexError, ValueError):
        return not Path(f"/proc/{pid}").exists()
    facts = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    pending = int(facts.get("SigPnd", "0"), 16) | int(facts.get("ShdPnd", "0"), 16)
    return bool(flags & _PF_EXITING or pending & _SIGKILL_BIT) or facts.get("State", "").startswith(("Z", "X"))


def watch_guardian(guardian_pid: int, told: Told) -> None:
    """Hear of the guardian's death: nobody else would clean up after the agent then."""

    def gone() -> None:
        told("the guardian of this node was killed", 1, True)

    try:
        _watch(guardian_pid, gone)
    except ProcessLookupError:
        return gone()
    except (OSError, AttributeError):  # a kernel before 5.3
        prctl.signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != guardian_pid:  # it died before we began to listen
        gone()
    return None


def watch_init(init: int, told: Told) -> None:
    """Hear of the end of the namespace's init: all that was in there went with it, and nothing more can be started."""
    with contextlib.suppress(OSError, AttributeError):  # a kernel before 5.3: the next start says so
        _watch(init, lambda: told("the init of this node's PID namespace was killed", 1, True))


def _watch(pid: int, gone: Callable[[], None]) -> None:
    """Have ``gone`` called when a process has ended; raises OSError."""
    loop = asyncio.get_running_loop()

    def hear(descriptor: int) -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        gone()

    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, hear, descriptor)
