"""The one place where a worker's process begins. Returns who it is, or says in words why there is none.

No thread, no shell and no pipe between agent and worker; nothing here waits for it.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurmfork.agent.command import find
from slurmfork.process import Identity, identify


class StartFailed(Exception):
    """A worker could not be started; says why, and with what status a shell would have told it."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def open_log(path: Path) -> int:
    """A descriptor that appends to a worker's log, made 0600 if new; raises StartFailed."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise StartFailed(f"cannot open the log {path}: {error.strerror}") from None


def spawn(
    argv: Sequence[str], *, cwd: str, environment: Mapping[str, str], log: int, proc: int | None = None
) -> Identity:
    """Start ``argv`` in a session of its own, its output in ``log``; raises StartFailed.

    The process is the caller's to reap, by its PID. ``proc``: where a thread that is in a namespace sees who it is.
    """
    try:
        started = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        status = 127 if isinstance(error, FileNotFoundError) else 126  # as shells have it
        raise StartFailed(_reason(error, argv[0], cwd, environment), status) from None
    started.returncode = 0  # the agent reaps its children itself: this object is not to wait for anything
    identity = identify(started.pid, proc)
    assert identity is not None  # nobody has reaped it yet
    return identity


def _reason(error: OSError | ValueError, program: str, cwd: str, environment: Mapping[str, str]) -> str:
    if not isinstance(error, OSError):
        return f"cannot start {program}: {error}"
    place = Path(cwd)
    if not place.is_dir():
        return f"working directory does not exist: {cwd}"
    if not os.access(place, os.X_OK):
        return f"working directory cannot be entered: {cwd}"
    found = find(str(place / program) if "/" in program else program, environment.get("PATH"))
    if error.errno == errno.ENOENT:
        missing = f"cannot run {program}: the interpreter that its first line names does not exist"
        return missing if found else f"command not found: {program}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"not executable: {program}"
    if error.errno == errno.ENOEXEC:
        return f"cannot run {program}: neither a program for this machine nor a script with a #! line"
    if error.errno == errno.E2BIG:
        return f"cannot run {program}: its arguments and environment are too long for the kernel"
    return f"cannot start {program}: {error.strerror}"
