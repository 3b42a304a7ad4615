"""Log view: the logs of a run on a terminal or in a pipe, one raw, or many, each line with its worker's name.

Writes bytes as the workers wrote them. Follows by looking again and again, until the run is over.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from slurmfork import names
from slurmfork.logs import Merged, Source, Tail, sources
from slurmfork.run import Run

POLL = 0.15  # seconds between two looks at the files
ASK = 5.0  # seconds between two questions whether a run is over that has left no word
MARKED = 1000  # lines after which it is said anew where we are
COLOURS = (b"36", b"33", b"35", b"32", b"34", b"96", b"93", b"95", b"92", b"94")


class Printer:
    """Writes labelled lines to stdout; in colour on a terminal, a colour for each role."""

    def __init__(self, *, prefix: bool = True, width: int = 0) -> None:
        self._prefix = prefix
        self._width = width
        self._colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._roles: dict[str, bytes] = {}
        self.lines = 0

    def line(self, source: Source, text: bytes) -> int:
        """Write one line; returns how many bytes that were."""
        self.lines += 1
        return sys.stdout.buffer.write(self._label(source) + text + b"\n" if self._prefix else text + b"\n")

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


class Marks:
    """Says, to whoever passes the output on, where a repeat of this command may begin should its reader be lost.

    By SLURMFORK_MARKS: a descriptor, and where an earlier one was (empty: this is the first).
    """

    def __init__(self) -> None:
        descriptor, _, text = os.environ.get(names.MARKS, "").partition(":")
        self._descriptor = int(descriptor) if descriptor else None
        self.offsets: dict[str, int] | None = json.loads(text) if text else None
        self._told = text
        self.written = 0

    def tell(self, offsets: Mapping[str, int]) -> None:
        """All that was read up to these offsets is written."""
        sys.stdout.buffer.flush()
        text = json.dumps(offsets)
        if self._descriptor is not None and text != self._told:
            self._told = text
            line = json.dumps({"output": self.written, "text": text}) + "\n"
            _write_all(self._descriptor, line.encode())


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def merged(run: Run, role: str | None, *, last: int | None, follow: bool, prefix: bool) -> int:
    """Print the logs of a run, or of one role; returns how many lines there were."""
    marks = Marks()
    view = Merged(run.rundir, role, last, marks.offsets)
    known = [source.label for source in sources(run.rundir, role)]
    printer = Printer(prefix=prefix, width=max(map(len, known), default=0))

    def look(final: bool) -> None:
        for source, line in view.new(final=final):
            marks.written += printer.line(source, line)
            if printer.lines % MARKED == 0:
                marks.tell(view.offsets)
        marks.tell(view.offsets)

    _repeat(look, follow=follow, over=End(run).reached)
    return printer.lines


def raw(run: Run, path: Path, *, last: int | None, follow: bool) -> None:
    """Print one file as it is."""
    marks = Marks()
    tail = Tail(path, last) if marks.offsets is None else Tail(path, offset=marks.offsets.get("", 0))

    def look(final: bool) -> None:
        for piece in tail.pieces(insist=final):
            marks.written += sys.stdout.buffer.write(piece)
            marks.tell({"": tail.offset})

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
