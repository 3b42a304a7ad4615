"""Shared memory between processes of one node: a large buffer is written once, and its descriptor is passed.

An unnamed file in memory (memfd), gone with its last descriptor and mapping, whoever dies: nothing is left to remove.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from contextlib import suppress
from typing import Any

from slurmfork.errors import CodecError

LEAST = 256 * 1024  # bytes; below, two copies through a socket are quicker (scripts/bench --only engine)
MOST_DESCRIPTORS = 64  # in one message; the kernel takes 253

# fcntl's own names for these came with Python 3.8 to 3.10, not on all systems.
_ADD_SEALS, _GET_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033), getattr(fcntl, "F_GET_SEALS", 1034)
_SEAL, _SHRINK, _GROW = 1, 2, 4
_UNTRACKED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def put(data: memoryview) -> int | None:
    """A descriptor of a file in memory that holds ``data``; None where the system gives none.

    It is written, not mapped and copied to: the kernel then neither clears pages first nor faults on each.
    """
    descriptor = -1
    try:
        descriptor = os.memfd_create("slurmfork", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        rest = data.cast("B")
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        fcntl.fcntl(descriptor, _ADD_SEALS, _SEAL | _SHRINK | _GROW)
    except OSError:
        with suppress(OSError):
            os.close(descriptor)
        return None
    return descriptor


def take(descriptor: int, size: int) -> memoryview:
    """The bytes behind a descriptor, mapped and writable; takes the descriptor over. Raises CodecError."""
    try:
        if not fcntl.fcntl(descriptor, _GET_SEALS) & _SHRINK or os.fstat(descriptor).st_size < size:
            raise CodecError("shared memory that could shrink, or is too small, is refused")
        return memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, **_UNTRACKED))
    except (OSError, ValueError) as error:
        raise CodecError(f"shared memory cannot be mapped: {error}") from None
    finally:
        os.close(descriptor)
