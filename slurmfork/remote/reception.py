"""The reception: takes in code at the door, piece by piece, into the store beside the runs.

The client asks which contents are not there, sends only these, and hears of each piece that it was taken. What was
cut off has left nothing that counts.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from slurmfork import rundir
from slurmfork.code.store import Store, Writer
from slurmfork.errors import UsageError
from slurmfork.remote.frames import Absent, Ask, Frame, Kind, Piece


class Reception:
    """One client's. ``tell`` sends a frame to it."""

    def __init__(self, tell: Callable[[Kind, bytes], None]) -> None:
        self._tell = tell
        self._store: Store | None = None
        self._writer: Writer | None = None

    def take(self, frame: Frame) -> None:
        """Serve an ASK or a PIECE; raises SlurmforkError, in one line, where it cannot be done."""
        if frame.kind is Kind.ASK:
            ask = msgspec.msgpack.decode(frame.data, type=Ask)
            self._store = Store(rundir.root_of(ask.root))
            absent = Absent(self._store.missing(ask.wanted))
            self._tell(Kind.ABSENT, msgspec.msgpack.encode(absent))
        else:
            self._keep(msgspec.msgpack.decode(frame.data, type=Piece))
            self._tell(Kind.TAKEN, b"")

    def _keep(self, piece: Piece) -> None:
        if self._store is None:
            raise UsageError("code was sent before it was said what it is for")
        self._writer = self._writer or self._store.writer()
        self._writer.feed(piece.data)
        if piece.digest is not None:
            writer, self._writer = self._writer, None
            if writer.finish() != piece.digest:
                raise UsageError("what came is not what was sent")

    def close(self) -> None:
        """What is not whole is forgotten."""
        if self._writer is not None:
            self._writer.drop()
            self._writer = None
