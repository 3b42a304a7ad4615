"""Frames: how messages between callers and hosts lie on a connection, and what they are.

A frame is a fixed prefix, the sizes of its buffers, a head (a small struct below), a body (a value, see
``engine.codec``) and the buffers. A buffer in shared memory is not on the connection, its descriptor comes along.
A frame owns its bytes: once made, nothing that the caller or an engine does to its arrays changes it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from slurmfork.engine import shared
from slurmfork.engine.codec import Packed
from slurmfork.engine.shared import Block, Lender
from slurmfork.engine.warm import Warm

PREFIX = struct.Struct("<III4x")  # bytes of the head, bytes of the body, number of buffers
BUFFER = struct.Struct("<QQ")  # its bytes; 0, or the number of a block of shared memory, doubled, and 1 if it is new
_JOINED = 256 * 1024  # bytes up to which a copy is cheaper than a part of its own
_MOST_DESCRIPTORS = 64  # with one frame; the kernel takes 253


# --- what is said ------------------------------------------------------------------------------------------


class Message(Struct, array_like=True, tag_field="kind", gc=False):
    """Base of what is said."""


class Hello(Message, tag=1):
    """Caller to host, first: the run that it means, and its session, which outlives a lost connection."""

    run_id: str
    session: str


class Welcome(Message, tag=2):
    """Host to caller, in answer: who it is."""

    worker: str
    pid: int


class Call(Message, tag=3):
    """Caller to host: call ``method`` of ``engine`` of ``worker``; the body is [args, kwargs].

    An empty engine is the worker's own. ``window``: so many items of a stream may come before more is asked for;
    0: no stream. ``received``: answers that have arrived, and need be kept no longer.
    """

    id: int
    worker: str
    engine: str
    method: str
    pickled: bool
    window: int
    received: list[int]


class Create(Message, tag=4):
    """Caller to host: make an engine; the body is [args, kwargs]. ``path`` is ``package.module:Class``.

    ``pickle``: whether pickled calls are taken, for a worker's own engine; further ones do as that does.
    """

    id: int
    worker: str
    engine: str
    path: str
    pickle: bool


class Remove(Message, tag=5):
    """Caller to host: close an engine, and forget it."""

    id: int
    worker: str
    engine: str


class Ask(Message, tag=6):
    """Caller to host: how it is; answered at once, whatever its engines do."""

    id: int


class Cancel(Message, tag=7):
    """Caller to host: nobody waits for this call any more."""

    id: int


class More(Message, tag=8):
    """Caller to host: so many more items of this stream may come."""

    id: int
    items: int


class Received(Message, tag=9):
    """Caller to host: answers that have arrived, where no call is there to tell it."""

    ids: list[int]


class Result(Message, tag=10):
    """Host to caller: what the method returned, in the body; of a stream, its end."""

    id: int
    pickled: bool


class Item(Message, tag=11):
    """Host to caller: the next of a stream, in the body."""

    id: int
    pickled: bool


class Failure(Message, tag=12):
    """Host to caller: why there is no result; the body is as ``engine.failures`` has it."""

    id: int


class Freed(Message, tag=13):
    """Both ways: nobody here looks at these blocks of yours any more."""

    blocks: list[int]


class Dropped(Message, tag=14):
    """Both ways: these blocks of mine will not be used again."""

    blocks: list[int]


_Asked = Hello | Call | Create | Remove | Ask | Cancel | More | Received
_Answered = Welcome | Result | Item | Failure
_encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(_Asked | _Answered | Freed | Dropped).decode


# --- frames out --------------------------------------------------------------------------------------------


class Frame:
    """A frame to be sent, perhaps again: ``parts`` in their order, and the blocks of ``lender`` that it refers to."""

    __slots__ = ("blocks", "lender", "lent", "parts", "size")

    def __init__(
        self, parts: Sequence[bytes | memoryview], blocks: Sequence[Block] = (), lender: Lender | None = None
    ) -> None:
        self.parts = parts
        self.blocks = blocks
        self.lender = lender
        self.lent = bool(blocks)  # then it can be sent but once: what it refers to is used again
        self.size = sum(map(len, parts))

    def hand_over(self) -> list[int]:
        """It is being sent: the blocks are the other end's now. The descriptors of those that it does not know."""
        new = [block.descriptor for block in self.blocks if not block.known]
        for block in self.blocks:
            block.known = True
        self.blocks = ()
        return new

    def __del__(self) -> None:
        for block in self.blocks:
            assert self.lender is not None
            self.lender.give_back(block)


NOTHING = Packed(b"", ())


def frame(message: Message, value: Packed = NOTHING, lender: Lender | None = None, memory: Warm | None = None) -> Frame:
    """What is sent; large buffers go by shared memory where there is a ``lender``, else are copied to ``memory``."""
    head = _encode(message)
    if not value.buffers:
        return Frame([PREFIX.pack(len(head), len(value.body), 0) + head + value.body])
    table: list[bytes] = []
    inline: list[memoryview] = []
    blocks: list[Block] = []
    for data in value.buffers:
        sharing = lender is not None and data.nbytes >= shared.LEAST and len(blocks) < _MOST_DESCRIPTORS
        block = lender.lend(data) if lender is not None and sharing else None
        if block is None:
            inline.append(data)
            table.append(BUFFER.pack(data.nbytes, 0))
        else:
            blocks.append(block)
            table.append(BUFFER.pack(data.nbytes, block.number << 1 | (not block.known)))
    start = b"".join((PREFIX.pack(len(head), len(value.body), len(table)), *table, head, value.body))
    if sum(data.nbytes for data in inline) < _JOINED:
        return Frame([b"".join((start, *inline))], blocks, lender)
    return Frame([start, *map(memory.copy if memory is not None else bytes, inline)], blocks, lender)
