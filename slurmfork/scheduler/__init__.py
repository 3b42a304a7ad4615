"""The scheduler API, which a training controller programs against: the same on every backend.

    with slurmfork.Scheduler("loop.yaml", backend="slurm") as scheduler:
        scheduler.create_workers("rollout")
        scheduler.fork_workers("eval", "rollout")
        scheduler.create_engine("rollout/0", "package.module:Class", "policy", seed=7)
        scheduler.call_engine("rollout/0", "generate", prompts, engine="policy")

A scheduler is one run, and the run is the allocation: its spec declares every role that has devices of its own, with
``autostart: false`` for those that are created when the controller asks, in any order, deleted, and created again.
What is forked beside a role takes no devices, and need not be declared. Raises, beside SlurmforkError's other kinds:
WorkerCreationError, WorkerFailed (exit status, end of the log), WorkerTimeout, WorkerNotFound, PortAllocationError,
and EngineError with those below it.

Its storeys, each of which knows those below: ``allocation`` (the run), ``workers`` (created, found, deleted),
``engines`` (made in workers, and called).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from slurmfork.errors import UsageError
from slurmfork.run import Run
from slurmfork.scheduler.engines import ENVIRONMENT, Engines
from slurmfork.scheduler.workers import Worker
from slurmfork.spec.model import Spec


class Scheduler(Engines):
    """The workers of one run, created, called and deleted by role. May be used from any thread.

    ``spec`` is the path of a spec, or a Spec; the other arguments are those of ``slurmfork.submit``. As a context
    manager it ends the run, and raises StillAlive if anything of it is left.
    """

    def __init__(
        self,
        spec: Spec | str | os.PathLike[str] | None = None,
        *,
        backend: str | None = None,
        root: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        run: Run | None = None,
    ) -> None:
        if (spec is None) == (run is None):
            raise UsageError("a scheduler is of a spec, which it submits, or of a run that was submitted: give one")
        if run is None:
            from slurmfork.submission import submit

            assert spec is not None
            run = submit(spec, backend=backend, root=root, overrides=overrides, environment=environment)
        super().__init__(run)


__all__ = ["ENVIRONMENT", "Scheduler", "Worker"]
