"""Printing: documents for programs, tables and words for people.

Knows how things look, and nothing of what they mean. rich is imported only where a table goes to a terminal.
Texts that came from workers or from Slurm are printed as they are, never read as markup.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Sequence
from typing import Any

from slurmfork import errors

KINDS: dict[type[errors.SlurmforkError], str] = {
    errors.SpecError: "spec",
    errors.PlanError: "plan",
    errors.UsageError: "usage",
    errors.RunNotFound: "not_found",
    errors.Unanswered: "unanswered",
    errors.BackendError: "backend",
    errors.RunDirError: "run_dir",
    errors.Unreachable: "unreachable",
    errors.StillAlive: "still_alive",
    errors.ConfigError: "config",
    errors.ConnectionLost: "connection_lost",
    errors.TransportError: "transport",
}
STYLES = {
    "ready": "green",
    "running": "green",
    "completed": "green",
    "yes": "green",
    "failed": "bold red",
    "node_fail": "bold red",
    "timeout": "red",
    "preempted": "yellow",
    "unknown": "yellow",
    "cancelled": "yellow",
    "stopping": "yellow",
    "restarting": "yellow",
    "pending": "cyan",
    "starting": "cyan",
    "NO": "bold red",
    "SILENT": "bold red",
    "alive": "green",
    "not ours": "bold red",
}

_written = False  # a document is on stdout: there may be one only


def reset() -> None:
    """Forget what was printed: a new command begins."""
    global _written
    _written = False


def claim() -> None:
    """The one JSON document is printed, by whomever."""
    global _written
    _written = True


def document(data: Any) -> None:
    """Print the one JSON document; ``data`` may hold structs."""
    import msgspec

    claim()
    print(msgspec.json.format(msgspec.json.encode(data), indent=2).decode(), flush=True)


def error_document(error: BaseException, message: str, kind: str) -> None:
    """Print an error as the JSON document, if no document was printed before it."""
    if _written:
        return
    found: dict[str, Any] = {"error": message, "kind": kind}
    if isinstance(error, errors.SpecError):
        found["ok"] = False
        found["errors"] = problems(error)
    elif isinstance(error, errors.Refused):
        import msgspec

        found["workers"] = msgspec.to_builtins(error.detail) if isinstance(error.detail, list) else []
    import json

    print(json.dumps(found, indent=2), flush=True)


def problems(error: errors.SpecError) -> list[dict[str, Any]]:
    """What is wrong with a spec, for programs."""
    return [{"file": p.file, "line": p.line, "path": p.path, "message": p.message} for p in error.problems]


def kind_of(error: errors.SlurmforkError) -> str:
    """The stable word for an error."""
    own = getattr(error, "kind", None)
    return own or next((word for kind, word in KINDS.items() if isinstance(error, kind)), "failed")


def say(line: str = "") -> None:
    """A line for people, on stdout."""
    print(line, flush=True)


def complain(line: str) -> None:
    """A line on stderr, marked as ours."""
    print(f"slurmfork: {line}", file=sys.stderr, flush=True)


def aside(line: str) -> None:
    """A line on stderr that goes with the one before."""
    print(line, file=sys.stderr, flush=True)


def give_up_lost() -> bool:
    """Whether the reader of stdout or stderr has left, or its terminal; what is said there then goes nowhere."""
    watch = select.poll()
    for descriptor in (1, 2):
        watch.register(descriptor, 0)
    lost = [descriptor for descriptor, event in watch.poll(0) if event & (select.POLLERR | select.POLLHUP)]
    if lost:
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        for descriptor in lost:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
    return bool(lost)


def table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, indent: str = "") -> None:
    """Print an aligned table; in colour and cut to the width of the terminal, if there is one."""
    cells = [["" if cell is None else one_line(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(titles, cells, indent)
    else:
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        for line in [list(titles), *cells]:
            print((indent + "  ".join(map(str.ljust, line, widths))).rstrip())
        sys.stdout.flush()


def _rich_table(titles: Sequence[str], cells: list[list[str]], indent: str) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, title in enumerate(titles):
        last = number == len(titles) - 1
        grid.add_column(title, no_wrap=True, overflow="ellipsis" if last else "fold")
    for row in cells:
        grid.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    Console(highlight=False).print(Padding(grid, (0, 0, 0, len(indent))))


def one_line(text: str) -> str:
    """``text`` without line breaks and control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())


def span(seconds: float) -> str:
    """A duration in few letters: 4s, 12m, 3h, 5d."""
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f}s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f}m"
    if seconds < 72 * 3600:
        return f"{seconds / 3600:.0f}h"
    return f"{seconds / 86_400:.0f}d"


def since(moment: float | None) -> str:
    """How long ago a moment (seconds since the epoch) was; empty if it never was."""
    return span(time.time() - moment) if moment else ""


def numbers(items: Sequence[int | str]) -> str:
    """A list of devices or ports, runs of numbers drawn together: 0-3,6."""
    parts: list[str] = []
    position = 0
    while position < len(items):
        end = position
        while end + 1 < len(items) and _follows(items[end], items[end + 1]):
            end += 1
        parts.append(str(items[position]) if end == position else _stretch(items[position], items[end]))
        position = end + 1
    return ",".join(parts)


def _follows(first: int | str, second: int | str) -> bool:
    return str(first).isdecimal() and str(second).isdecimal() and int(second) == int(first) + 1


def _stretch(first: int | str, last: int | str) -> str:
    return f"{first},{last}" if int(last) == int(first) + 1 else f"{first}-{last}"


def plural(count: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}es" if noun.endswith("s") else f"{count} {noun}s"
