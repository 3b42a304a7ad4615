"""The store: content by its SHA-256, beside the runs, so that what was sent once need not be sent again.

Private to its user. An object is written beside its place and renamed there; whoever reads one checks it. Nothing
but submits that are under way needs an object: a run has its own copy of its code.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path

from slurmfork import rundir
from slurmfork.errors import RunDirError
from slurmfork.userdir import private_directory

YOUNGEST_S = 3600.0  # an object that somebody has asked for since may be about to be needed
PIECE = 1 << 20


class Store:
    """The store of this user under a root; made at the first write. Raises RunDirError, in one line."""

    def __init__(self, root: Path) -> None:
        self.path = root / f".code-{os.geteuid()}"  # a root may be shared

    def place(self, digest: bytes) -> Path:
        """Where an object is, or would be."""
        name = digest.hex()
        return self.path / name[:2] / name[2:]

    def missing(self, wanted: Sequence[tuple[bytes, int]]) -> list[int]:
        """Which of ``wanted`` (digest and size) are not there, by their numbers; the others are kept for a while."""
        try:
            rundir.check_private(self.path)  # what somebody else has put there is not looked at
        except OSError:
            return list(range(len(wanted)))
        absent = []
        for number, (digest, size) in enumerate(wanted):
            place = self.place(digest)
            try:
                whole = place.lstat().st_size == size
                if whole:
                    os.utime(place)
            except OSError:
                whole = False
            if not whole:
                absent.append(number)
        return absent

    def writer(self) -> Writer:
        """To write one object."""
        try:
            rundir.make_private(self.path.parent)
            private_directory(self.path)
            return Writer(self)
        except OSError as error:
            raise RunDirError(f"cannot write to {self.path}: {error.strerror}") from None

    def put(self, data: bytes) -> bytes:
        """Keep ``data``; its digest."""
        writer = self.writer()
        writer.feed(data)
        return writer.finish()

    def copy(self, digest: bytes, descriptor: int | None = None) -> bytes:
        """Copy an object to a descriptor, or return it; raises RunDirError if it is not there, or damaged."""
        place, found, kept = self.place(digest), hashlib.sha256(), bytearray()
        try:
            with place.open("rb") as file:
                while data := file.read(PIECE):
                    found.update(data)
                    if descriptor is None:
                        kept += data
                    else:
                        write_all(descriptor, data)
        except FileNotFoundError:
            raise RunDirError(f"{place} is gone since it was sent; submit again") from None
        if found.digest() != digest:
            place.unlink(missing_ok=True)
            raise RunDirError(f"{place} was damaged, and is removed; submit again")
        return bytes(kept)

    def prune(self, older_than: float) -> tuple[int, int]:
        """Remove objects that nobody has asked for in so many seconds; how many, and how many bytes."""
        limit = time.time() - max(older_than, YOUNGEST_S)
        count = size = 0
        with contextlib.suppress(FileNotFoundError):
            rundir.check_private(self.path)
        for place in self.path.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = place.lstat()
                if facts.st_mtime < limit:
                    place.unlink()
                    count, size = count + 1, size + facts.st_size
        return count, size


class Writer:
    """One object that is being written: nobody sees it before it is whole."""

    def __init__(self, store: Store) -> None:
        self._store, self._hash = store, hashlib.sha256()
        incoming = private_directory(store.path / "incoming")
        self._temporary = incoming / secrets.token_hex(8)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self._temporary, flags, 0o600)

    def feed(self, data: bytes) -> None:
        self._hash.update(data)
        try:
            write_all(self._descriptor, data)
        except OSError as error:
            self.drop()
            raise RunDirError(f"cannot write to {self._store.path}: {error.strerror}") from None

    def finish(self) -> bytes:
        """Put it into its place; its digest."""
        digest = self._hash.digest()
        place = self._store.place(digest)
        try:
            os.close(self._descriptor)
            private_directory(place.parent)
            self._temporary.rename(place)
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise RunDirError(f"cannot write to {self._store.path}: {error.strerror}") from None
        return digest

    def drop(self) -> None:
        """Forget it."""
        with contextlib.suppress(OSError):
            os.close(self._descriptor)
        self._temporary.unlink(missing_ok=True)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
