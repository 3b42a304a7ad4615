"""Reading a file of the code as it is now, which may not be what it was a moment ago."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from slurmfork.code.store import PIECE
from slurmfork.errors import UsageError


class Vanished(Exception):
    """The file is not there any more."""


def pieces(directory: Path, name: str) -> Iterator[bytes]:
    """A file's content, up to the size that it has at the beginning: logs grow for ever. Raises Vanished."""
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise Vanished from None
    except OSError as error:
        raise _unreadable(name, error) from None
    with open(descriptor, "rb", buffering=0) as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise Vanished
        left = facts.st_size
        try:
            while left > 0 and (data := file.read(min(PIECE, left))):
                left -= len(data)
                yield data
        except OSError as error:
            raise _unreadable(name, error) from None


def _unreadable(name: str, error: OSError) -> UsageError:
    return UsageError(f"code: cannot read {name}: {error.strerror}; `exclude` leaves it out")
