"""What goes through a door: frames of one kind and a length, so that output, signals and states share a stream.

The stream from a login node may begin with whatever its shell says at login; the first frame is found behind that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from msgspec import Struct

from slurmfork.errors import TransportError

PROTOCOL = 1
MAGIC = b"\0slurmfork-door\0"
LARGEST = 16 << 20
NOISE = 1 << 20  # bytes that a shell may say at login before it counts as being no shell of ours
_HEAD = struct.Struct(">cI")


class Kind(Enum):
    """Kinds of frames; the first five go to the far side, the others come from there."""

    REQUEST = b"R"
    SIGNAL = b"S"
    THANKS = b"T"
    ASK = b"A"
    PIECE = b"P"
    HELLO = b"H"
    OUTPUT = b"O"
    ERRORS = b"E"
    MARK = b"M"
    EXIT = b"X"
    ABSENT = b"N"
    TAKEN = b"K"


class Frame(NamedTuple):
    """One frame."""

    kind: Kind
    data: bytes


class Terminal(Struct, kw_only=True):
    """The terminal that output will be shown on. ``plain``: without colours."""

    columns: int
    lines: int
    out: bool
    err: bool
    name: str = ""
    plain: bool = False


class Request(Struct, kw_only=True):
    """A verb to be run over there.

    ``files`` are laid down for it; a word whose place is in ``paths`` is the name of one, and becomes its path.
    ``secrets`` go into the environment of that process and into no other place. With ``once`` it is done once, however
    often ``request_id`` comes, and what it wrote is told from ``seen`` (bytes of output and of errors) on; without,
    it begins at ``mark``, the last word on where it was. ``code`` names the code that was sent before, if any was;
    ``cluster`` is the name by which its sender knows this one.
    """

    request_id: str
    args: list[str]
    paths: list[int] = []
    files: dict[str, bytes] = {}
    secrets: dict[str, str] = {}
    terminal: Terminal | None = None
    once: bool = False
    seen: tuple[int, int] = (0, 0)
    mark: str = ""
    code: str = ""
    cluster: str = ""


class Ask(Struct, kw_only=True):
    """Which of these contents (SHA-256 and size) are not in the store under ``root``? (None: as is usual there.)"""

    root: str | None
    wanted: list[tuple[bytes, int]]


class Absent(Struct):
    """The answer to an ASK: their numbers."""

    numbers: list[int]


class Piece(Struct, array_like=True):
    """A piece of a content, in order; the last one has the SHA-256 of all of it. TAKEN answers each."""

    data: bytes
    digest: bytes | None = None


class Hello(Struct, kw_only=True):
    """The first frame from over there."""

    protocol: int
    version: str
    python: str
    host: str


class Exit(Struct, kw_only=True):
    """The last frame: the exit status of the verb."""

    status: int


class Mark(Struct, kw_only=True):
    """``text`` is where a repeat may begin again once ``output`` bytes of output were received."""

    output: int
    text: str


def pack(kind: Kind, data: bytes) -> bytes:
    """A frame's bytes."""
    return _HEAD.pack(kind.value, len(data)) + data


class Unpacker:
    """Cuts a stream into frames. ``greeted``: the stream begins with MAGIC, after what may be said before it."""

    def __init__(self, *, greeted: bool) -> None:
        self._buffer = bytearray()
        self._waiting = greeted
        self.noise = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now; raises TransportError for what is no such stream."""
        self._buffer += data
        if self._waiting and not self._begun():
            return
        while len(self._buffer) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._buffer)
            if size > LARGEST:
                raise TransportError("the other side sent what is no frame: is it another version?")
            if len(self._buffer) < _HEAD.size + size:
                return
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + size])
            del self._buffer[: _HEAD.size + size]
            try:
                yield Frame(Kind(kind), body)
            except ValueError:
                raise TransportError(f"the other side sent a frame of kind {kind!r}: is it another version?") from None

    def _begun(self) -> bool:
        at = self._buffer.find(MAGIC)
        if at < 0:
            if len(self._buffer) > NOISE:
                raise TransportError("the login shell over there talks without an end")
            self.noise = bytes(self._buffer)
            return False
        self.noise = bytes(self._buffer[:at])
        del self._buffer[: at + len(MAGIC)]
        self._waiting = False
        return True
