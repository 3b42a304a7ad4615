"""The warning: the job is about to be ended, and workers that asked for it get a signal to save what they have.

Slurm warns the batch script (``--signal``) ahead of the time limit, up to a minute early, or when the job is
preempted. How long there still is, is Slurm's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Mapping

from slurmfork.errors import SlurmforkError
from slurmfork.head import scheduler
from slurmfork.head.workers import Workers
from slurmfork.messages import SignalRequest
from slurmfork.spec import Checkpoint, Spec

log = logging.getLogger(__name__)

LEAD_S = 60.0  # how long before the time limit Slurm is asked to warn where no role says
REQUEUE_S = 15.0  # beyond the longest grace, to end a run and have it requeued
EARLY_S = 75.0  # by how much Slurm may warn too early: a minute, and what asking takes
_LEFT = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")


class EndWarning:
    """Signals the workers of the roles that have a ``checkpoint``, each as long before the end as it asked.

    ``time_limit``: whether it is the time limit that is near. ``at_limit`` is called when a run that is to be
    requeued has to end, so that it has ended before Slurm ends it.
    """

    def __init__(
        self, spec: Spec, workers: Workers, environment: Mapping[str, str], at_limit: Callable[[], None]
    ) -> None:
        self.time_limit = False
        self._wanted = {name: role.checkpoint for name, role in spec.roles.items() if role.checkpoint}
        self._requeue = spec.requeue
        self._workers = workers
        self._job_id = environment.get("SLURM_JOB_ID", "")
        self._at_limit = at_limit
        self._tasks: set[asyncio.Task[None]] = set()

    def given(self) -> None:
        """The batch script was warned."""
        self.time_limit = True
        task = asyncio.ensure_future(self._pass_on())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self) -> None:
        left = await self._seconds_left()
        lead = max((checkpoint.before for checkpoint in self._wanted.values()), default=LEAD_S)
        if left is None or left > lead + EARLY_S:  # not the time limit's: preempted, or warned by somebody
            self.time_limit = left is None
            left = 0.0
        elif self._requeue:
            margin = min(lead / 2, self._workers.longest_grace() + REQUEUE_S)
            asyncio.get_running_loop().call_later(max(0.0, left - margin), self._at_limit)
        await asyncio.gather(*(self._signal(role, wanted, left) for role, wanted in self._wanted.items()))

    async def _signal(self, role: str, wanted: Checkpoint, left: float) -> None:
        await asyncio.sleep(max(0.0, left - wanted.before))
        with contextlib.suppress(SlurmforkError):  # a role that is not there has nothing to save
            told = await self._workers.signal(SignalRequest(target=role, signal=wanted.signal))
            log.info("%s to %s: the end is near", wanted.signal, ", ".join(told.signalled) or "nobody")

    async def _seconds_left(self) -> float | None:
        """Seconds until the time limit; None outside of Slurm, without a limit, or where Slurm does not say."""
        if not self._job_id:
            return None
        output = await scheduler.ask("squeue", "-h", "-j", self._job_id, "-o", "%L", patience=20)
        return None if output is None else seconds(output.strip())


def seconds(text: str) -> float | None:
    """Slurm's ``D-HH:MM:SS``, ``HH:MM:SS`` or ``MM:SS`` in seconds; None for ``UNLIMITED`` and the like."""
    found = _LEFT.fullmatch(text)
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
