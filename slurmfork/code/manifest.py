"""The manifest: what a run's code consists of, by path and content; and which manifests are to be believed.

One that came from elsewhere may say anything: no path in it may lead out of the directory that it is laid into.
"""

from __future__ import annotations

import posixpath

import msgspec
from msgspec import Struct

from slurmfork.errors import UsageError
from slurmfork.rundir import CodeRecord

DIGEST_SIZE = 32  # bytes of a SHA-256


class Entry(Struct, array_like=True, frozen=True):
    """A file, or, with a ``target``, a symbolic link. ``path`` is relative; ``digest`` is the SHA-256 of a file."""

    path: str
    size: int = 0
    executable: bool = False
    digest: bytes = b""
    target: str | None = None


class Manifest(Struct, kw_only=True):
    """All entries, and what the run will record of them."""

    record: CodeRecord
    entries: list[Entry]

    def encode(self) -> bytes:
        """The same bytes for the same code."""
        return msgspec.msgpack.encode(self)


def decode(data: bytes) -> Manifest:
    """Read a manifest, and check it; raises UsageError."""
    try:
        found = msgspec.msgpack.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise UsageError(f"the list of the code's files is none: {error}") from None
    check(found.entries)
    return found


def check(entries: list[Entry]) -> None:
    """Raise UsageError for entries that lead out of their directory, or contradict each other."""
    seen: set[str] = set()
    for entry in entries:
        if not _stays_inside(entry.path) or entry.path in seen:
            raise UsageError(f"{entry.path[:200]!r} is no path of a file of the code")
        seen.add(entry.path)
        if entry.target is None and (len(entry.digest) != DIGEST_SIZE or entry.size < 0):
            raise UsageError(f"{entry.path[:200]!r} comes without its content")
        if entry.target is not None and not link_stays_inside(entry.path, entry.target):
            raise UsageError(f"the link {entry.path[:200]!r} leads out of the code")
    for entry in entries:  # nothing may lie below a file, nor, above all, behind a link
        above = posixpath.dirname(entry.path)
        while above:
            if above in seen:
                raise UsageError(f"{entry.path[:200]!r} leads through {above[:200]!r}, which is no directory")
            above = posixpath.dirname(above)


def _stays_inside(path: str) -> bool:
    return bool(path) and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def link_stays_inside(path: str, target: str) -> bool:
    """Whether a link's own words keep it inside. (Through other links they may still lead out.)"""
    if not target or "\0" in target or target.startswith("/"):
        return False
    reached = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
    return reached != ".." and not reached.startswith("../")
