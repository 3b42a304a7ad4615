"""The journal: the append-only record of every process that an agent started on its node, one JSON line each.

The agent writes it, before and after each start; whoever cleans up after the agent reads it. It says what was
started, never what lives: only /proc knows that.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from slurmfork import process
from slurmfork.process import Identity

Pid: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]

MAX_LINE = 4 * 1024 * 1024
MAX_JOURNAL = 512 * 1024 * 1024


class _Line(Struct, kw_only=True, tag_field="op"):
    """What every record holds: when it was written, in seconds since the epoch."""

    time: float = field(default_factory=time.time)


class Intent(_Line, tag="intent", kw_only=True):
    """A start, named by ``start_id``, is about to happen: what carries the tag from now on may be it."""

    start_id: str
    worker: str
    argv: list[str]


class Started(_Line, tag="started", kw_only=True):
    """It happened: this is the process."""

    start_id: str
    worker: str
    pid: Pid
    start_time: int
    boot_id: str
    uid: int
    argv: list[str]

    @property
    def identity(self) -> Identity:
        return Identity(self.pid, self.start_time, self.boot_id)


class Seen(_Line, tag="seen", kw_only=True):
    """Descendants of a worker that were not recorded before, as (pid, start time)."""

    worker: str
    processes: list[tuple[Pid, int]]
    boot_id: str = field(default_factory=process.boot_id)


class Ended(_Line, tag="ended", kw_only=True):
    """The process of a start was reaped; says nothing of its descendants."""

    start_id: str
    worker: str
    pid: Pid
    exit_status: int | None = None


class Note(_Line, tag="note", kw_only=True):
    """Something that a person who reads the journal should know."""

    text: str


Record: TypeAlias = Intent | Started | Seen | Ended | Note


class Records(list[Record]):
    """What a journal holds, in order; ``damaged`` counts lines that could not be read."""

    damaged = 0


class Living(NamedTuple):
    """A process that, as far as the journal knows, may still run; ``uid`` is None where it was only seen."""

    identity: Identity
    worker: str
    uid: int | None = None


class Journal:
    """The journal of one node, open for appending. Raises OSError for what is no plain file of this user."""

    def __init__(self, path: Path) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        try:
            _check(self._descriptor, path)
            os.fchmod(self._descriptor, 0o600)
            self._torn = _ends_torn(self._descriptor)
        except BaseException:
            self.close()
            raise

    def append(self, *records: Record, sync: bool = True) -> None:
        """Write the records and have them, and all before them, on the disk when this returns; raises OSError.

        Without ``sync`` they are only where every process of this node sees them, whoever dies: what the record
        of an intent is for. (If the node itself dies, so does all that was started on it.)
        """
        data = b"".join(_encoder.encode(record) + b"\n" for record in records)
        if self._torn:  # the last line was cut short: let it not spoil this one
            data = b"\n" + data
        written = os.write(self._descriptor, data)
        self._torn = written < len(data) and (written > 0 or self._torn)
        if written < len(data):
            raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes of the journal were written")
        if sync:
            os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file; harmless when repeated."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def _check(descriptor: int, path: Path) -> os.stat_result:
    """Only a regular file of this user is believed: anybody may have put a file, a pipe or a link there."""
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        raise OSError(errno.EINVAL, "the journal is not a regular file", str(path))
    if facts.st_uid != os.geteuid():
        raise OSError(errno.EPERM, "the journal belongs to another user", str(path))
    return facts


def _ends_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def read(path: Path) -> Records:
    """Everything in a journal that can be read, in order; a torn or damaged line is skipped and counted.

    Raises OSError where there is no journal, or something that only pretends to be one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if _check(descriptor, path).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(errno.EPERM, "the journal can be written to by others", str(path))
        records = Records()
        for line in _lines(file):
            try:
                records.append(_decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError):
                records.damaged += 1
        return records


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines that are not empty; of one that is too long only the beginning, which decodes to nothing."""
    total = 0
    while total < MAX_JOURNAL and (line := file.readline(MAX_LINE)):
        total += len(line)
        rest = line
        while rest and not rest.endswith(b"\n") and total < MAX_JOURNAL:
            rest = file.readline(MAX_LINE)
            total += len(rest)
        if line.strip():
            yield line


def unfinished(records: Iterable[Record]) -> list[Started]:
    """Starts, of whatever boot and so of whatever machine, whose end no record tells."""
    starts: dict[tuple[str, int], Started] = {}
    for record in records:
        if isinstance(record, Started):
            starts[record.start_id, record.pid] = record
        elif isinstance(record, Ended):
            starts.pop((record.start_id, record.pid), None)
    return list(starts.values())


def living(records: Iterable[Record]) -> list[Living]:
    """Processes of this boot that no record says have ended, each once.

    What was seen below a worker stays in the list when the worker has ended: it may have outlived it.
    """
    everything = list(records)
    ended = {(record.start_id, record.pid) for record in everything if isinstance(record, Ended)}
    found: dict[Identity, Living] = {}
    over: set[Identity] = set()
    for record in everything:
        if isinstance(record, Started):
            found[record.identity] = Living(record.identity, record.worker, record.uid)
            if (record.start_id, record.pid) in ended:
                over.add(record.identity)
        elif isinstance(record, Seen):
            for pid, start_time in record.processes:
                identity = Identity(pid, start_time, record.boot_id)
                found.setdefault(identity, Living(identity, record.worker))
    here = process.boot_id()
    return [one for identity, one in found.items() if identity.boot_id == here and identity not in over]
