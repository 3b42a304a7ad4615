"""The private directory of this user on this host, below which sockets, locks and shared answers lie.

Under /tmp, where anybody may have put anything before: only real directories of this user are used, 0700. A name
that somebody else has taken is passed over, or any user could keep any other from running anything.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from slurmfork.errors import RunDirError

LONGEST = 29  # bytes; with what agents and programs add, a Unix socket's path stays within its 107
_SPARE = 9


def user_directory() -> Path:
    """What all processes of this user on this host share, made if need be; raises RunDirError if there is no place.

    Port locks hold only among those who come to the same one: so one that is there goes before one to be made.
    """
    places = list(_places())
    for place in places:
        with contextlib.suppress(OSError):
            if _is_ours(place.lstat()):
                return private_directory(place)
    for place in places:
        with contextlib.suppress(OSError, RunDirError):
            return private_directory(place)
    raise RunDirError(f"others have taken {places[0]} to {places[_SPARE]}: have them removed, or set XDG_RUNTIME_DIR")


def _places() -> Iterator[Path]:
    """In the order of preference; the session's own comes last, as not all have it, and it goes with the session."""
    plain = f"/tmp/slurmfork-{os.geteuid()}"
    yield Path(plain)
    for number in range(1, _SPARE + 1):
        yield Path(f"{plain}-{number}")
    session = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    with contextlib.suppress(OSError):
        facts = session.lstat()
        if _is_ours(facts) and not facts.st_mode & 0o077 and len(os.fsencode(session / "slurmfork")) <= LONGEST:
            yield session / "slurmfork"


def private_directory(path: Path) -> Path:
    """Make a directory 0700, or take one of this user; raises RunDirError for anything else of that name."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    facts = path.lstat()
    if not _is_ours(facts):
        raise RunDirError(f"{path} is not a directory of this user: remove it, or ask who made it to")
    if stat.S_IMODE(facts.st_mode) & 0o077:
        path.chmod(0o700)
    return path


def _is_ours(facts: os.stat_result) -> bool:
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
