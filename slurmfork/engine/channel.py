"""What a connection that carries frames is to those who use it, over a Unix socket of this node or mutual TLS.

``send`` may be called by any thread; ``post`` leaves it to the loop, which then sends many at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from slurmfork.engine.inbox import Arrived
from slurmfork.engine.shared import Lender
from slurmfork.engine.warm import Warm
from slurmfork.engine.wire import Frame

BUFFER = 1024 * 1024  # bytes that a socket is asked to hold


class Channel(Protocol):
    """What a connection is to those who use it. ``lost`` of the maker is called once, in the loop, when it ends."""

    lender: Lender | None  # of shared memory, where both ends are on one node
    memory: Warm | None  # for large buffers where they are not

    def send(self, frame: Frame) -> None:
        """Send; what cannot leave at once waits. Nothing happens once it is closed."""

    def post(self, frame: Frame) -> None:
        """Send when the loop has its turn, or with the next ``send``."""

    def close(self) -> None:
        """Let what waits go, and end it; in the loop."""

    def disown(self) -> None:
        """In a process that was forked: the connection is the parent's alone."""


Taker = Callable[[Arrived], None]
Loser = Callable[[str], None]


class Piece(NamedTuple):
    """A part of a frame that waits to be sent, with the descriptors that go with it."""

    part: bytes | memoryview
    descriptors: Sequence[int] = ()


def abandon(*sockets: _Descriptor | None) -> None:
    """In a process that was forked: have no part in these, so that their other ends hear of the parent's death.

    Their numbers stay taken: whoever closes one here closes nothing of somebody else's.
    """
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for one in sockets:
        if one is not None and (number := one.fileno()) >= 0:
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)


class _Descriptor(Protocol):
    def fileno(self) -> int: ...


def pieces(frame: Frame) -> Iterator[Piece]:
    yield Piece(frame.parts[0], frame.hand_over() if frame.blocks else ())
    for part in frame.parts[1:]:
        yield Piece(part)
