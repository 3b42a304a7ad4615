"""What a backend is: it gets nodes, has one agent started on each by the batch script, reports on its job.

Only shapes live here. A backend never looks into a run's workers, and never decides what a run's state is: it
says what its scheduler says, and "don't know" (a state of None) where that says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct, field

from slurmfork.names import RunState

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.rundir import RunDir
    from slurmfork.spec import Spec


PATIENCE_S = 60.0  # for a scheduler's answer


class Job(Struct, frozen=True, kw_only=True):
    """A job as its scheduler knows it. Ids are reused: it is told by id and ``submitted`` (epoch) together.

    ``notes`` are what the scheduler had to say at submission though it took the job; to be shown.
    """

    job_id: str
    cluster: str | None = None
    submitted: float
    notes: list[str] = field(default_factory=list)


class JobReport(Struct, kw_only=True):
    """What the scheduler says of a job. ``state`` None: it is not known; ``reason`` says why.

    ``word`` is the scheduler's own word for the state, to be shown as it is; ``fresh`` is when it was asked,
    ``started`` and ``ended`` when the job did; all in seconds since the epoch.
    """

    state: RunState | None
    word: str = ""
    reason: str = ""
    exit_status: int | None = None
    nodes: str = ""
    fresh: float
    started: float | None = None
    ended: float | None = None


class Check(Struct, kw_only=True):
    """One thing that `doctor` looked at, and what was found; not ``ok`` is what prevents runs.

    ``means`` says what that means for runs here, where it means something, and ``todo`` what the user can do.
    """

    name: str
    ok: bool
    detail: str
    means: str = ""
    todo: str = ""


class Backend(Protocol):
    """Who gives the nodes. Methods raise BackendError in the scheduler's own words."""

    name: str

    def submit(self, rundir: RunDir, spec: Spec, request: Request) -> Job:
        """Start the batch script of a filled run directory, in time; what is refused has started nothing.

        Raises Unanswered where that is not known.
        """

    def started(self, rundir: RunDir) -> str | None:
        """The id of the job that has begun to work in this directory, by what it wrote there; None: none has."""

    def report(self, jobs: Sequence[tuple[RunDir, Job]], patience: float = PATIENCE_S) -> list[JobReport]:
        """What the scheduler says of each of these jobs, in their order; it is asked once for all. Never raises.

        After ``patience`` seconds, what it said before is told, with its age; or that nothing is known.
        """

    def cancel(self, rundir: RunDir, job: Job, patience: float = PATIENCE_S) -> None:
        """Have the job ended; one that is over already is left alone.

        ``patience``: seconds for the scheduler to answer; or, where none sees to it, for the job to end in order.
        """

    def ended(self, rundir: RunDir, job: Job) -> bool:
        """Whether the job is surely over, asked now; cheap enough to be called in a loop."""

    def host(self, rundir: RunDir, node: str) -> str:
        """The name of the machine that a node of a run is, for ssh."""

    def step(self, job: Job, node: str) -> list[str]:
        """The beginning of a command line that runs a command on a node of a job; empty where none does."""

    def check(self) -> list[Check]:
        """What `doctor` should say about this backend here."""
