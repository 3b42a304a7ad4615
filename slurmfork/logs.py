"""Logs: the files that a run's workers write, read as one stream of labelled lines.

Reading only, by polling sizes (network file systems announce no changes) and in bounded pieces: no file is
held open, none is read into memory whole. Nothing here prints, waits, or asks the head.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from slurmfork.names import NAME_PATTERN
from slurmfork.rundir import RunDir

PIECE = 64 * 1024
LONGEST_LINE = 64 * 1024
BAR_INTERVAL = 5.0  # seconds between two looks at a progress bar, a line that is drawn over and never ends

_WORKER_LOG = re.compile(rf"({NAME_PATTERN.pattern})-(0|[1-9][0-9]{{0,5}})\.log")


@dataclass(frozen=True, order=True)
class Source:
    """One worker's log."""

    role: str
    index: int
    path: Path

    @property
    def label(self) -> str:
        """The worker's name."""
        return f"{self.role}/{self.index}"


def sources(rundir: RunDir, role: str | None = None) -> list[Source]:
    """The logs that there are, by role and index; ``role`` leaves out the others."""
    try:
        entries = [entry.name for entry in os.scandir(rundir.logs)]
    except OSError:
        return []
    found = [
        Source(match[1], int(match[2]), rundir.logs / name)
        for name in entries
        if (match := _WORKER_LOG.fullmatch(name))
    ]
    return sorted(source for source in found if role in (None, source.role))


def start_of_last(path: Path, count: int) -> int:
    """The offset at which the last ``count`` lines of a file begin; an unfinished line counts as one."""
    with path.open("rb") as file:
        end = position = file.seek(0, os.SEEK_END)
        if count == 0:
            return end
        missing = count
        while position > 0:
            size = min(PIECE, position)
            position -= size
            file.seek(position)
            piece = file.read(size)
            if position + size == end and piece.endswith(b"\n"):
                piece = piece[:-1]  # ends the last line, and begins none
            newlines = piece.count(b"\n")
            if newlines >= missing:
                return position + _nth_last_newline(piece, missing) + 1
            missing -= newlines
    return 0


def _nth_last_newline(piece: bytes, count: int) -> int:
    at = len(piece)
    for _ in range(count):
        at = piece.rindex(b"\n", 0, at)
    return at


class Tail:
    """One growing file, read piece by piece from where the last look ended."""

    def __init__(self, path: Path, last: int | None = None, offset: int = 0) -> None:
        self.path = path
        self._last = last
        self._offset: int | None = None if last is not None else offset

    @property
    def offset(self) -> int:
        """How far it was read, in bytes."""
        return self._offset or 0

    def pieces(self, *, insist: bool = False) -> Iterator[bytes]:
        """What was appended since the last look, as far as the file reached when this look began.

        ``insist`` opens the file whatever its size seems to be: opening is what makes a network file system
        ask its server. A file that is not there has nothing to read yet; one that shrank is read anew.
        """
        with contextlib.suppress(OSError):
            if self._offset is None:
                self._offset = start_of_last(self.path, self._last or 0)
            size = self.path.stat().st_size
            if size < self._offset:
                self._offset = 0
            if size > self._offset or insist:
                yield from self._read(size, insist=insist)

    def _read(self, size: int, *, insist: bool) -> Iterator[bytes]:
        assert self._offset is not None
        with self.path.open("rb") as file:
            if insist:
                size = max(size, os.fstat(file.fileno()).st_size)
            file.seek(self._offset)
            while (left := size - self._offset) > 0 and (piece := file.read(min(PIECE, left))):
                self._offset += len(piece)
                yield piece


class Lines:
    """One growing file as lines, without their ends; of a line that was drawn over, what was drawn last."""

    def __init__(self, path: Path, last: int | None = None, offset: int = 0) -> None:
        self._tail = Tail(path, last, offset)
        self._at = offset
        self._rest = b""
        self._bar_shown = time.monotonic()

    def new(self, *, final: bool = False) -> Iterator[bytes]:
        """The lines finished since the last look; with ``final`` also what is left of an unfinished one."""
        for piece in self._tail.pieces(insist=final):
            *whole, rest = piece.split(b"\n")
            self._at = self._tail.offset - len(piece) - len(self._rest)
            for line in whole:
                line = self._rest + line
                self._rest = b""
                self._at += len(line) + 1
                yield _visible(line)
            self._rest += rest
            if len(self._rest) > LONGEST_LINE:
                yield self._take()
        self._at = self._tail.offset - len(self._rest)
        if self._rest and (final or self._bar_is_due()):
            yield self._take()

    @property
    def offset(self) -> int:
        """Where the first line begins that was not given away, in bytes."""
        return self._at

    def _bar_is_due(self) -> bool:
        now = time.monotonic()
        if b"\r" not in self._rest or now - self._bar_shown < BAR_INTERVAL:
            return False
        self._bar_shown = now
        return True

    def _take(self) -> bytes:
        rest, self._rest = self._rest, b""
        self._at += len(rest)
        return _visible(rest)


def _visible(line: bytes) -> bytes:
    if b"\r" not in line:
        return line
    return next((part for part in reversed(line.split(b"\r")) if part), b"")


class Merged:
    """The logs of a run, or of one of its roles, as lines with who wrote them; new logs join in."""

    def __init__(
        self,
        rundir: RunDir,
        role: str | None = None,
        last: int | None = None,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        self._rundir = rundir
        self._role = role
        self._last = last
        self._offsets = offsets or {}
        self._known: dict[Source, Lines] = {}
        self._looked = offsets is not None

    @property
    def offsets(self) -> dict[str, int]:
        """How far each log was read, by the worker's name: where another one may go on."""
        return {source.label: lines.offset for source, lines in self._known.items()}

    @property
    def sources(self) -> list[Source]:
        """The logs seen so far."""
        return sorted(self._known)

    def new(self, *, final: bool = False) -> Iterator[tuple[Source, bytes]]:
        """Lines that came since the last look, log by log: between two logs there is no order to keep."""
        for source in sources(self._rundir, self._role):
            if source not in self._known:  # a log that began later is new from its first line on
                last = None if self._looked else self._last
                self._known[source] = Lines(source.path, last, self._offsets.get(source.label, 0))
        self._looked = True
        for source in self.sources:
            for line in self._known[source].new(final=final):
                yield source, line
