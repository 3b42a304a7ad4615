"""Every error that a caller of slurmfork may want to treat differently, each with a message that says what to do.

The CLI prints ``str(error)`` as one line and exits with ``exit_code``; nothing else in the package prints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slurmfork.messages import WorkerView


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


class EngineError(SlurmforkError):
    """Base of what can go wrong with engines, the Python objects that workers host."""


class CodecError(EngineError):
    """A value cannot be sent, or what was sent is refused here; the message names its type."""


class EngineNotFound(EngineError):
    """A worker has no engine of that name, or an engine no such method."""


class EngineCallError(EngineError):
    """A call failed in the engine with an exception that cannot be raised here as it was.

    ``kind`` is the exception's type, ``module:name``; the remote traceback is the cause.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


class WorkerFailed(EngineError):
    """The worker ended before it answered. ``exit_status`` and ``log_tail`` as in its WorkerView."""

    def __init__(self, message: str, worker: str = "", exit_status: int | None = None, log_tail: str = "") -> None:
        super().__init__(message)
        self.worker = worker
        self.exit_status = exit_status
        self.log_tail = log_tail


class SchedulerError(SlurmforkError):
    """Base of what ``slurmfork.scheduler`` adds: what was asked of a run's workers could not be done."""


class WorkerCreationError(SchedulerError):
    """Workers of ``role`` could not be created, and none of them is left.

    ``workers`` are those that failed, as WorkerViews with exit_status and log_tail; ``kind`` is the head's word for it.
    """

    def __init__(self, role: str, reason: str, *, kind: str = "", workers: Sequence[WorkerView] = ()) -> None:
        tail = next((f"\n{view.log_tail}" for view in workers if view.log_tail), "")
        super().__init__(f"workers of {role} could not be created: {reason}{tail}")
        self.role, self.reason, self.kind, self.workers = role, reason, kind, list(workers)


class WorkerNotFound(SchedulerError):
    """There is no such role or worker: it was not created, or it was deleted. ``key`` is what was asked for."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


class WorkerTimeout(SchedulerError, TimeoutError):
    """Workers were not up in time. ``key`` is the role (or the run), ``timeout`` in seconds."""

    def __init__(self, key: str, timeout: float, reason: str) -> None:
        super().__init__(reason)
        self.key, self.timeout = key, timeout


class PortAllocationError(SchedulerError):
    """A worker's node has not so many free ports, or cannot be asked. ``worker`` and ``count`` are what was asked."""

    def __init__(self, worker: str, count: int, reason: str) -> None:
        super().__init__(f"{count} ports for {worker}: {reason}")
        self.worker, self.count = worker, count


def one_line(text: str) -> str:
    """Text that may be anything, as one printable line."""
    return " ".join("".join(char if char.isprintable() or char.isspace() else "?" for char in text).split())
