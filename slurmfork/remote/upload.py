"""An upload: brings code to where a run will need it, only what is not there, before the submit is asked for.

After a lost connection it asks again, so what had arrived is not sent twice. A file that changes meanwhile goes as it
was read; one that vanishes is left out, and said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import msgspec
from msgspec.structs import replace

from slurmfork.code.listing import Listing
from slurmfork.code.manifest import Entry, Manifest
from slurmfork.code.reading import Vanished, pieces
from slurmfork.code.store import PIECE
from slurmfork.errors import ConnectionLost, UsageError
from slurmfork.remote.frames import Absent, Ask, Exit, Frame, Kind, Piece, pack
from slurmfork.remote.transport import Channel
from slurmfork.remote.visit import GaveUp, send

AT_ONCE = 20_000  # contents that are asked about in one frame
WINDOW = 8 << 20  # bytes that may be under way without having been taken
WINDOW_PIECES = 256
ROUNDS = 5  # more than one is needed only where files change meanwhile


class Bar(Protocol):
    """Where progress is shown, in bytes."""

    def show(self, done: int, total: int) -> None:
        """So much of what has to be sent has arrived."""


class Upload:
    """One directory's. ``root`` is where runs live over there (None: as is usual there)."""

    def __init__(self, listing: Listing, root: str | None, bar: Bar, say: Callable[[str], None]) -> None:
        self._listing, self._root, self._bar, self._say = listing, root, bar, say
        self._entries: list[Entry] = []
        self._read = False
        self.taken = 0  # bytes that the far side has said it has
        self.sent = 0  # contents that were sent

    def send(self, channel: Channel, frames: Iterator[Frame]) -> str:
        """Send what is missing; the name by which the submit can ask for all of it. Raises GaveUp, ConnectionLost."""
        if not self._read:
            self._entries = self._hashed(self._listing.entries)
            self._read = True
        line = _Line(channel, frames)
        for _ in range(ROUNDS):
            files = [entry for entry in self._entries if entry.target is None]
            missing = self._missing(line, [(entry.digest, entry.size) for entry in files])
            if not missing:
                return self._send_manifest(line)
            once = {files[number].digest: files[number].path for number in missing}  # of twins one is sent
            self._send_files(line, set(once.values()))
        raise UsageError(f"code: files in {self._listing.directory} change faster than they can be sent")

    def _hashed(self, entries: Iterable[Entry]) -> list[Entry]:
        found = []
        for entry in entries:
            if entry.target is None:
                try:
                    entry = self._as_read(entry, pieces(self._listing.directory, entry.path))
                except Vanished:
                    self._gone(entry)
                    continue
            found.append(entry)
        return found

    def _as_read(self, entry: Entry, data: Iterable[bytes]) -> Entry:
        digest, size = hashlib.sha256(), 0
        for piece in data:
            digest.update(piece)
            size += len(piece)
        return replace(entry, digest=digest.digest(), size=size)

    def _gone(self, entry: Entry) -> None:
        self._say(f"{entry.path} vanished while it was read, and is left out of the code")

    def _missing(self, line: _Line, wanted: Sequence[tuple[bytes, int]]) -> list[int]:
        absent = []
        for at in range(0, len(wanted), AT_ONCE):
            ask = Ask(root=self._root, wanted=list(wanted[at : at + AT_ONCE]))
            absent += [at + number for number in line.ask(ask)]
        return absent

    def _send_files(self, line: _Line, paths: set[str]) -> None:
        total = sum(entry.size for entry in self._entries if entry.path in paths)
        kept: list[Entry] = []
        before = self.taken

        def took(size: int) -> None:
            self.taken += size
            self._bar.show(self.taken - before, total)

        line.took = took
        for entry in self._entries:
            if entry.path not in paths:
                kept.append(entry)
                continue
            try:
                data = pieces(self._listing.directory, entry.path)
                kept.append(self._as_read(entry, line.sending(data)))
            except Vanished:
                self._gone(entry)
                continue
            self.sent += 1
        line.settle()
        self._entries = kept

    def _send_manifest(self, line: _Line) -> str:
        size = sum(entry.size for entry in self._entries)
        record = self._listing.record
        record.files, record.size = len(self._entries), size
        data = Manifest(record=record, entries=self._entries).encode()
        digest = hashlib.sha256(data).digest()
        if self._missing(line, [(digest, len(data))]):
            for _ in line.sending(data[at : at + PIECE] for at in range(0, len(data), PIECE)):
                pass
            line.settle()
        return digest.hex()


class _Line:
    """The stream to the door, with a limit to what is under way: nobody may wait for who waits for him."""

    def __init__(self, channel: Channel, frames: Iterator[Frame]) -> None:
        self._channel, self._frames = channel, frames
        self._under_way: list[int] = []
        self.took: Callable[[int], None] = lambda size: None

    def ask(self, ask: Ask) -> list[int]:
        """The numbers of what is not there."""
        send(self._channel, pack(Kind.ASK, msgspec.msgpack.encode(ask)))
        return msgspec.msgpack.decode(self._next(Kind.ABSENT).data, type=Absent).numbers

    def sending(self, data: Iterable[bytes]) -> Iterator[bytes]:
        """Send one content while it is read; yields it as it goes by."""
        digest, last = hashlib.sha256(), b""
        first = True
        for piece in data:
            if not first:
                self._send(Piece(last))
            digest.update(piece)
            first, last = False, piece
            yield piece
        self._send(Piece(last, digest.digest()))

    def settle(self) -> None:
        """Wait until all of it was taken."""
        while self._under_way:
            self._wait()

    def _send(self, piece: Piece) -> None:
        send(self._channel, pack(Kind.PIECE, msgspec.msgpack.encode(piece)))
        self._under_way.append(len(piece.data))
        while sum(self._under_way) > WINDOW or len(self._under_way) > WINDOW_PIECES:
            self._wait()

    def _wait(self) -> None:
        self._next(Kind.TAKEN)
        self.took(self._under_way.pop(0))

    def _next(self, kind: Kind) -> Frame:
        for frame in self._frames:
            if frame.kind is kind:
                return frame
            if frame.kind is Kind.EXIT:
                raise GaveUp(msgspec.json.decode(frame.data, type=Exit).status)
        raise ConnectionLost("the door over there closed")
