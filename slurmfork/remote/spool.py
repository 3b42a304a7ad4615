"""The spool: what is kept of an errand that is to be done once, so that a lost connection loses and repeats nothing.

A private directory in the user's home, which all login nodes of a cluster share. An errand holds a lock there for as
long as it runs, leaves its PID as its first act, and its exit status as its last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
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
    place = Path("~/.slurmfork/door").expanduser()
    place.parent.mkdir(mode=0o700, exist_ok=True)
    return private_directory(place)


class Spool:
    """One errand's. Raises UsageError for a name that is none."""

    def __init__(self, request_id: str) -> None:
        if not _ID.fullmatch(request_id):
            raise UsageError(f"{request_id[:80]!r} is no request id")
        self.path = home() / request_id
        self._held: int | None = None

    def begin(self) -> bool:
        """Make it, or take over one whose door died before its errand began; the lock is held then, until ``let_go``.

        False: the errand was begun before.
        """
        if not self.path.exists() and self._make():
            return True
        if not self.is_here() or (held := self.lock()) is None:
            return False
        if (self.path / "pid").exists() or (self.path / "status").exists():
            os.close(held)
            return False
        self._held = held
        shutil.rmtree(self.path / "files", ignore_errors=True)
        return True

    def _make(self) -> bool:
        """Nobody sees it before it is locked; False where somebody else was first."""
        making = Path(tempfile.mkdtemp(prefix=LOOK, dir=self.path.parent))
        try:
            (making / "host").write_text(socket.gethostname())
            self._held = _locked(making / "lock")
            making.rename(self.path)
        except OSError as error:
            self.let_go()
            shutil.rmtree(making, ignore_errors=True)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        return True

    def let_go(self) -> None:
        """Let go of the lock; an errand that was forked meanwhile has a copy of it."""
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def lay_down(self, files: dict[str, bytes]) -> Path:
        """Write the files that came along; returns the directory that they are in."""
        directory = self.path / "files"
        directory.mkdir(mode=0o700)
        lay_down(directory, files)
        return directory

    def open(self, name: str) -> int:
        """A descriptor to append to ``out`` or ``err``."""
        return os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def lock(self) -> int | None:
        """Hold it; None where somebody else does. The lock lasts as long as any copy of the descriptor."""
        return _locked(self.path / "lock")

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Say meanwhile that somebody sees what becomes of it; several may."""
        descriptor = os.open(self.path / "watch", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            yield
        finally:
            os.close(descriptor)

    def is_watched(self) -> bool:
        """Whether anybody sees what becomes of it."""
        alone = _locked(self.path / "watch")
        if alone is None:
            return True
        os.close(alone)
        return False

    def note_pid(self) -> None:
        """The errand's first act: it says who does it, to whom signals go."""
        replace_file(self.path / "pid", str(os.getpid()).encode())

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
        """The exit status; None: it is not over. One that was killed, and has left none, has 137."""
        idle = self.is_here() and self.is_idle()  # looked at first: it leaves its status before the lock
        with contextlib.suppress(OSError, ValueError):
            return int((self.path / "status").read_text())
        return ENDED_BY_FORCE if idle else None

    def was_killed(self) -> bool:
        """Of an errand that is over: whether it left no word."""
        return not (self.path / "status").exists()

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


def _locked(file: Path) -> int | None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


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
