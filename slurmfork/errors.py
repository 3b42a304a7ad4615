"""Every error that a caller of slurmfork may want to treat differently, each with a message that says what to do.

The CLI prints ``str(error)`` as one line and exits with ``exit_code``; nothing else in the package prints.
"""

from __future__ import annotations

from dataclasses import dataclass


class SlurmforkError(Exception):
    """Base of all errors of this package. ``exit_code`` is what the CLI exits with."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a spec: where (file, 1-based line, dotted path) and what."""

    message: str
    path: str = ""
    line: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        where = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        head = f"{where}: " if where else ""
        return f"{head}{self.path}: {self.message}" if self.path else f"{head}{self.message}"


class SpecError(SlurmforkError):
    """The spec is wrong; ``problems`` lists everything that was found, in the order of the file."""

    exit_code = 2

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class PlanError(SlurmforkError):
    """The roles cannot be placed on the nodes; the message holds the arithmetic."""

    exit_code = 2


class UsageError(SlurmforkError):
    """What was asked makes no sense as asked (an unknown worker, a bad value); nothing was done."""

    exit_code = 2


class RunNotFound(SlurmforkError):
    """No run, or more than one, answers to the given name."""


class BackendError(SlurmforkError):
    """The scheduler refused or failed; the message holds its own words."""


class Unanswered(BackendError):
    """The scheduler did not say whether it took a job: it may have, or still take it."""


class RunDirError(SlurmforkError):
    """The run directory cannot be written, read, or is not what it should be."""


class Unreachable(SlurmforkError):
    """The head of the run could not be reached; whether the run lives is then the scheduler's to say."""


class Refused(SlurmforkError):
    """The head or an agent refused a request; ``kind`` is a stable word, the message says why."""

    def __init__(self, message: str, kind: str = "refused", detail: object = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.detail = detail


class ConfigError(SlurmforkError):
    """The file with the profiles of clusters is wrong, or lacks one; the message names file and key."""

    exit_code = 2


class TransportError(SlurmforkError):
    """A machine could not be reached, or refused us; the message names it and says what to do."""


class ConnectionLost(TransportError):
    """A connection that stood, or was about to, went away: what was under way may or may not have been done."""


class NotReached(TransportError):
    """A machine does not answer, or not in time: it may later."""


class NotOpened(ConnectionLost):
    """A connection went away before we were in; whoever wanted it has tried often enough."""


class StillAlive(SlurmforkError):
    """A stop or a cancel left processes alive; the message names them."""


def one_line(text: str) -> str:
    """Text that may be anything, as one printable line."""
    return " ".join("".join(char if char.isprintable() or char.isspace() else "?" for char in text).split())
