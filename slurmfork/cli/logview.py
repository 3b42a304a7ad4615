"""Log view: the logs of a run on a terminal or in a pipe, one raw, or many, each line with its worker's name.

Writes bytes as the workers wrote them. Follows by looking again and again, until the run is over.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slurmfork.logs import Merged, Source, Tail, sources
from slurmfork.run import Run

POLL = 0.15  # seconds between two looks at the files
ASK = 5.0  # seconds between two questions whether a run is over that has left no word
COLOURS = (b"36", b"33", b"35", b"32", b"34", b"96", b"93", b"95", b"92", b"94")


class Printer:
    """Writes labelled lines to stdout; in colour on a terminal, a colour for each role."""

    def __init__(self, *, prefix: bool = True, width: int = 0) -> None:
        self._prefix = prefix
        self._width = width
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._roles: dict[str, bytes] = {}
        self.lines = 0

    def line(self, source: Source, text: bytes) -> None:
        """Write one line."""
        self.lines += 1
        sys.stdout.buffer.write(self._label(source) + text + b"\n" if self._prefix else text + b"\n")

    def _label(self, source: Source) -> bytes:
        self._width = max(self._width, len(source.label))
        label = source.label.ljust(self._width).encode() + b" |"
        if not self._colour:
            return label + b" "
        colour = self._roles.setdefault(source.role, COLOURS[len(self._roles) % len(COLOURS)])
        return b"\x1b[" + colour + b"m" + label + b"\x1b[0m "


class End:
    """Tells when a run is over: by its files at once, by asking around only now and then."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._asked = time.monotonic()

    def reached(self) -> bool:
        """Whether the run is over, so that nothing more will be written."""
        if self._run.rundir.end.exists():
            return True
        if time.monotonic() - self._asked < ASK and not self._run.rundir.batch_status.exists():
            return False
        over = self._run.status().over
        self._asked = time.monotonic()
        return over


def merged(run: Run, role: str | None, *, last: int | None, follow: bool, prefix: bool) -> int:
    """Print the logs of a run, or of one role; returns how many lines there were."""
    view = Merged(run.rundir, role, last)
    known = [source.label for source in sources(run.rundir, role)]
    printer = Printer(prefix=prefix, width=max(map(len, known), default=0))

    def look(final: bool) -> None:
        for source, line in view.new(final=final):
            printer.line(source, line)

    _repeat(look, follow=follow, over=End(run).reached)
    return printer.lines


def raw(run: Run, path: Path, *, last: int | None, follow: bool) -> None:
    """Print one file as it is."""
    tail = Tail(path, last)

    def look(final: bool) -> None:
        for piece in tail.pieces(insist=final):
            sys.stdout.buffer.write(piece)

    _repeat(look, follow=follow, over=End(run).reached)


def _repeat(look: Callable[[bool], None], *, follow: bool, over: Callable[[], bool]) -> None:
    """Look once, or again and again; the last look comes after the end was seen: nothing is missed."""
    sys.stdout.flush()
    while True:
        final = not follow or over()
        look(final)
        sys.stdout.buffer.flush()
        if final:
            return
        time.sleep(POLL)
