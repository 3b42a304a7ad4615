"""Progress: watching a run until it is ready or over, and showing meanwhile what it waits for.

Three faces: a spinner on a terminal, a line on stderr for each change, or nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from slurmfork.cli import output
from slurmfork.errors import SlurmforkError
from slurmfork.names import RunState
from slurmfork.observe import RunStatus
from slurmfork.run import Run


class Late(SlurmforkError):
    """A wait took longer than it may; exits like timeout(1), as hardly any run does of its own."""

    exit_code = 124
    kind = "timeout"


class Face(Protocol):
    """Where progress is shown."""

    def show(self, status: RunStatus) -> None:
        """The run is like this now."""


class Silent:
    """Shows nothing."""

    def show(self, status: RunStatus) -> None:
        pass


class Plain:
    """A line on stderr whenever state or reason change."""

    def __init__(self) -> None:
        self._said = ""

    def show(self, status: RunStatus) -> None:
        line = f"{status.run_id} is {status.state}" + (f": {why}" if (why := waiting_for(status)) else "")
        if line != self._said:
            self._said = line
            output.complain(line)


@contextmanager
def face(*, quiet: bool = False) -> Iterator[Face]:
    """The face that fits: a spinner where stdout is a terminal, else lines; nothing if ``quiet``."""
    if quiet:
        yield Silent()
    elif not sys.stdout.isatty():
        yield Plain()
    else:
        from rich.console import Console

        with Console(highlight=False).status("") as spinner:
            yield _Spinner(spinner)


class _Spinner:
    def __init__(self, spinner: object) -> None:
        self._spinner = spinner

    def show(self, status: RunStatus) -> None:
        from rich.status import Status
        from rich.text import Text

        assert isinstance(self._spinner, Status)
        text = Text(f"{status.run_id} is ")
        text.append(str(status.state), output.STYLES.get(str(status.state), ""))
        parts = [waiting_for(status), counts(status), output.since(status.submitted)]
        self._spinner.update(Text("  ").join([text, *(Text(part) for part in parts if part)]))


def waiting_for(status: RunStatus) -> str:
    """Why a run is where it is, in a line."""
    return output.one_line(status.reason)


def counts(status: RunStatus) -> str:
    """How many nodes have joined and workers are up, once there are any."""
    parts = []
    if status.nodes:
        parts.append(f"{sum(node.joined for node in status.nodes)} of {output.plural(len(status.nodes), 'node')}")
    if status.workers.total:
        up = status.workers.ready + status.workers.running
        parts.append(f"{up} of {output.plural(status.workers.total, 'worker')} up")
    return ", ".join(parts)


def notes(status: RunStatus) -> list[str]:
    """What is to be said of its nodes, a line each."""
    return [f"node {node.node}: {output.one_line(note)}" for node in status.nodes for note in node.notes]


def until(run: Run, goal: str, shown: Face, timeout: float | None = None) -> RunStatus:
    """Wait until the run is ``ready`` (or over) or ``done``; raises Late after ``timeout`` seconds."""
    deadline = None if timeout is None else time.monotonic() + timeout
    for status in run.progress(deadline):
        if status.over or (goal == "ready" and status.state is RunState.READY):
            return status
        shown.show(status)
    raise Late(f"{run.run_id} is not {goal} after {output.span(timeout or 0)}; it goes on")
