"""The spool: what is kept of an errand that is to be done once, so that a lost connection loses and repeats nothing.

A private directory in the user's home, which all login nodes of a cluster share. An errand holds a lock there for as
long as it runs, and leaves its exit status as its last act.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import time
from pathlib import Path

from slurmfork.errors import UsageError
from slurmfork.rundir import replace_file
from slurmfork.userdir import private_directory

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{7,63}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
LOOK = "look_"  # begins the names of directories of errands that are not kept
OLD_S = 7 * 86_400.0
ENDED_BY_FORCE = 137


def home() -> Path:
    """Where spools are, made if need be; raises RunDirError if it is not this user's alone."""
    top = Path("~/.slurmfork").expanduser()
    top.mkdir(mode=0o700, exist_ok=True)
    return private_directory(top / "door")


class Spool:
    """One errand's. Raises UsageError for a name that is none."""

    def __init__(self, request_id: str) -> None:
        if not _ID.fullmatch(request_id):
            raise UsageError(f"{request_id[:80]!r} is no request id")
        self.path = home() / request_id

    def begin(self) -> bool:
        """Make it; False where it is there already, and so the errand was begun before."""
        try:
            self.path.mkdir(mode=0o700)
        except FileExistsError:
            return False
        (self.path / "host").write_text(socket.gethostname())
        return True

    def lay_down(self, files: dict[str, bytes]) -> Path:
        """Write the files that came along; returns the directory that they are in."""
        directory = self.path / "files"
        directory.mkdir(mode=0o700)
        lay_down(directory, files)
        return directory

    def open(self, name: str) -> int:
        """A descriptor to append to ``out`` or ``err``."""
        return os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def lock(self, name: str = "lock") -> int | None:
        """Hold it; None where somebody else does. The lock lasts as long as any copy of the descriptor."""
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
        return descriptor

    def note_pid(self, pid: int) -> None:
        """Say who does the errand, to whom signals go."""
        replace_file(self.path / "pid", str(pid).encode())

    def pid(self) -> int | None:
        """Who does the errand on this host, if it still runs."""
        if not self.is_here() or self.is_idle():
            return None
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / "pid").read_text())
        return None

    def is_here(self) -> bool:
        """Whether the errand was begun on this host: only here a lock says whether it runs."""
        with contextlib.suppress(OSError):
            return (self.path / "host").read_text() == socket.gethostname()
        return False

    def is_idle(self) -> bool:
        """Whether nobody does the errand, on this host."""
        lock = self.lock()
        if lock is None:
            return False
        os.close(lock)
        return True

    def finish(self, status: int) -> None:
        """The errand's last act."""
        replace_file(self.path / "status", str(status).encode())

    def status(self) -> int | None:
        """The exit status; None: it is not over. One that was killed has 137."""
        idle = self.is_here() and self.is_idle()  # looked at first: it leaves its status before the lock
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / "status").read_text())
        return ENDED_BY_FORCE if idle else None

    def read(self, name: str, offset: int, most: int = 65_536) -> bytes:
        """What was written to ``out`` or ``err`` from ``offset`` on, ``most`` bytes at most."""
        try:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                return file.read(most)
        except FileNotFoundError:
            return b""

    def remove(self) -> None:
        """Forget it."""
        shutil.rmtree(self.path, ignore_errors=True)


def lay_down(directory: Path, files: dict[str, bytes]) -> None:
    """Write files that came from elsewhere into a private directory; raises UsageError for a name that leads out."""
    for name, data in files.items():
        if not _FILE.fullmatch(name):
            raise UsageError(f"{name[:80]!r} is no name for a file that is sent")
        descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)


def remove_old(now: float | None = None) -> None:
    """Forget errands whose client never came back for them."""
    limit = (time.time() if now is None else now) - OLD_S
    for entry in os.scandir(home()):
        with contextlib.suppress(OSError):
            if entry.stat(follow_symlinks=False).st_mtime >= limit:
                continue
            if entry.name.startswith(LOOK) or (_ID.fullmatch(entry.name) and Spool(entry.name).status() is not None):
                shutil.rmtree(entry.path, ignore_errors=True)
