"""A stand-in for the agent: ``python stand_in_agent.py DIR guarded|bare WHAT [ARGUMENT...]``.

``guarded`` is under the real guardian, ``bare`` under none. It announces itself as ``agent`` when ready.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import awkward

from slurmfork.agent import guardian

DIRECTORY = sys.argv[1]
AWKWARD = str(Path(awkward.__file__))


def start(kinds: list[str]) -> None:
    for kind in kinds:
        command = [sys.executable, "-I", "-S", AWKWARD, kind, DIRECTORY, kind]
        subprocess.Popen(command, env={**os.environ, "SLURMFORK_NODE": guardian.node_name()})


def works(kinds: list[str]) -> int:
    """Starts awkward processes and stays, as an agent that is going to be killed."""
    start(kinds)
    awkward.announce(DIRECTORY, "agent")
    awkward.stay()
    return 0


def leaves(arguments: list[str]) -> int:
    """Starts one awkward process, and when that is there ends with the given status."""
    start(arguments[1:])
    for kind in arguments[1:]:
        while not Path(DIRECTORY, f"{kind}.pid").exists():
            signal.sigtimedwait([], 0.01)
    return int(arguments[0])


def raises(arguments: list[str]) -> int:
    raise RuntimeError(" ".join(arguments))


def exits(arguments: list[str]) -> int:
    sys.exit(arguments[0] if arguments else None)


def listens(_: list[str]) -> int:
    """Writes down each signal, and ends with status 5 at SIGTERM."""
    heard = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    awkward.announce(DIRECTORY, "agent")
    while True:
        number = signal.sigwait(heard)
        Path(DIRECTORY, f"heard-{signal.Signals(number).name}").touch()
        if number == signal.SIGTERM:
            return 5


def orphans(arguments: list[str]) -> int:
    """Leaves orphans that end at once to the guardian, and stays."""
    for _ in range(20):
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        os.wait()
    awkward.announce(DIRECTORY, "agent")
    awkward.stay()
    return 0


def state(_: list[str]) -> int:
    """Writes down what it was born with."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ignored = {n for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN}
    Path(DIRECTORY, "state").write_text(f"{sorted(blocked)} {sorted(map(int, ignored))}")
    return 0


WHAT: dict[str, Callable[[list[str]], int]] = {
    f.__name__: f for f in (works, leaves, raises, exits, listens, orphans, state)
}


def main(_: int) -> int:
    return WHAT[sys.argv[3]](sys.argv[4:])


if __name__ == "__main__":
    sys.exit(main(0) if sys.argv[2] == "bare" else guardian.run(main))
