"""An errand: one request's process over there, which runs a verb as if it had been typed.

It is forked from the door, so that nothing is on a command line or in an environment that others see. What it prints
goes through pipes to the door, or, where it must be done once, into files that outlive the connection.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from slurmfork import hints, names, prctl
from slurmfork.remote.frames import Request, Terminal

SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})  # that a client may send
INTERRUPTED = 130
FAULT = 70  # sysexits' EX_SOFTWARE: the verb could not even be begun


class Ends(NamedTuple):
    """Where an errand writes: output, errors, and where it is. ``others``: descriptors that are not for it."""

    out: int
    err: int
    marks: int | None = None
    others: tuple[int, ...] = ()


def fork(
    request: Request,
    directory: Path,
    ends: Ends,
    *,
    first: Callable[[], None] = lambda: None,
    last: Callable[[int], None] | None = None,
) -> int:
    """Start it; returns its PID.

    ``first`` is called in that process before it does anything, ``last`` hears the exit status as the last thing that
    it does; without a ``last`` it ends with the door.
    """
    door = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the errand hears none before it can tell
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return pid
    status = FAULT
    try:
        _become(ends)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if last is None:
            prctl.signal_at_parents_death(signal.SIGKILL)
            if os.getppid() != door:
                os._exit(FAULT)
        first()
        status = _run(request, directory, ends.marks)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else FAULT
    except KeyboardInterrupt:  # before the verb could hear it
        with contextlib.suppress(OSError):
            os.write(2, b"slurmfork: interrupted\n")
        status = INTERRUPTED
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.write(2, f"slurmfork: fault: {type(error).__name__}: {error}\n".encode())
    finally:
        try:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            if last is not None:
                last(status)
        finally:
            os._exit(status & 0xFF)


def _become(ends: Ends) -> None:
    """A process in a session of its own: what ends the connection does not end it."""
    os.setsid()
    for number in (*SIGNALS, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, place in ((nothing, 0), (ends.out, 1), (ends.err, 2)):
        os.dup2(descriptor, place)
    for descriptor in (nothing, ends.out, ends.err, *ends.others):
        os.close(descriptor)


def _run(request: Request, directory: Path, marks: int | None) -> int:
    os.environ.update(request.secrets)
    if marks is not None:
        os.environ[names.MARKS] = f"{marks}:{request.mark}"
        os.set_inheritable(marks, False)
    if request.cluster:
        hints.came_by(request.cluster)
    _dress(request.terminal)
    args = list(request.args)
    for place in request.paths:
        args[place] = str(directory / args[place])
    if request.code:
        args[1:1] = ["--code", request.code]
    from slurmfork.cli.main import main

    return main(args)


def _dress(terminal: Terminal | None) -> None:
    """Output as it would be on that terminal."""
    sys.stdin = open(0)  # noqa: SIM115
    sys.stdout = _Stream.of(1, tty=terminal is not None and terminal.out)
    sys.stderr = _Stream.of(2, tty=terminal is not None and terminal.err)
    if terminal is not None:
        size = {"COLUMNS": str(terminal.columns), "LINES": str(terminal.lines)}
        os.environ.update(size)
        os.environ[names.DRESSED] = " ".join(size)
        if terminal.name:
            os.environ["TERM"] = terminal.name
        if terminal.plain:
            os.environ["NO_COLOR"] = "1"


class _Stream(io.TextIOWrapper):
    """Standard output that ends on a terminal elsewhere."""

    tty = False

    @classmethod
    def of(cls, descriptor: int, *, tty: bool) -> _Stream:
        raw: IO[bytes] = open(descriptor, "wb", closefd=False)  # noqa: SIM115
        made = cls(raw, encoding="utf-8", errors="surrogateescape", line_buffering=tty or descriptor == 2)
        made.tty = tty
        return made

    def isatty(self) -> bool:
        return self.tty
