"""The Slurm backend: sbatch, scancel, and Slurm's word on its jobs, by Slurm's own commands on this machine.

It never looks at a run's workers, and holds no state of its own: jobs are known by id and submit time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slurmfork import account
from slurmfork.backends import slurm_records
from slurmfork.backends.base import PATIENCE_S, Check, Job, JobReport
from slurmfork.backends.queue import GONE, Queue, shared_directory
from slurmfork.backends.slurm_commands import Answer, ask, of_cluster
from slurmfork.backends.slurm_environment import environment_of_job
from slurmfork.backends.slurm_options import ignored
from slurmfork.errors import BackendError, Unanswered
from slurmfork.names import ENDED_STATES
from slurmfork.rundir import HeadRecord

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.rundir import RunDir
    from slurmfork.spec import Spec

_SUBMITTED = re.compile(r"^(\d+)(?:;(\S+))?$", re.MULTILINE)
_PREFIX = re.compile(r"\bsbatch: (?:(?:error|fatal): )?")
_LOST = re.compile("did not answer|timed out|receive failure|shutdown failure|Zero Bytes", re.IGNORECASE)
_NO_SLURM = "is this a Slurm login node? `--backend local` runs on this machine"
_LOOK_S = 1.0
_SUBMIT_TIME_S = 30.0  # it has just answered: what is slow now is that it limits how often it is asked
# As in templates/sbatch.sh.j2; the directory is one that every node has.
_STEP = [
    *("--nodes=1", "--ntasks=1", "--overlap", "--mem=0", "--cpu-bind=none", "--mpi=none", "--export=ALL"),
    *("--gres=none", "--wait=0", "--kill-on-bad-exit=0", "--chdir=/", "--time=1", "--quiet"),
]


class SlurmBackend:
    """Slurm as this machine's commands reach it. ``directory``: where processes share its answers."""

    name = "slurm"
    _ended: ClassVar[dict[tuple[str, float], tuple[float, bool]]] = {}

    def __init__(self, *, directory: Path | None = None) -> None:
        self._directory = directory

    def submit(self, rundir: RunDir, spec: Spec, request: Request) -> Job:
        """Submit the batch script; raises BackendError with Slurm's own words, and a hint, if refused.

        Raises Unanswered if the answer was lost on its way: a slow slurmctld takes jobs that it was sent long ago.
        """
        try:
            answer = ask(["sbatch", "--parsable", str(rundir.script)], env=environment_of_job(spec.secrets))
        except KeyboardInterrupt:
            raise Unanswered("sbatch was interrupted; Slurm may have taken the job all the same") from None
        if answer.missing:
            raise BackendError(f"{answer.words}: {_NO_SLURM}")
        found = _SUBMITTED.findall(answer.output)
        if not found and _LOST.search(answer.words):
            raise Unanswered(f"sbatch: {_PREFIX.sub('', answer.words)}; Slurm may have taken the job all the same")
        if not found:
            raise BackendError(_refusal(answer, request))
        job_id, cluster = found[-1]  # a site's wrapper may print before it
        submitted = _submit_time(job_id, cluster)
        notes = [*([answer.words] if answer.words else []), *_nameless(), *ignored(spec, os.environ)]
        return Job(job_id=job_id, cluster=cluster or None, submitted=submitted, notes=notes)

    def started(self, rundir: RunDir) -> str | None:
        """The job in which the head runs, or ran."""
        record = rundir.read_record(rundir.head, HeadRecord)
        return record.job_id if record else None

    def report(self, jobs: Sequence[tuple[RunDir, Job]], patience: float = PATIENCE_S) -> list[JobReport]:
        """Slurm's word on each job; Slurm is asked once for all, and every 10 s at most."""
        reports: dict[int, JobReport] = {}
        for cluster in sorted({job.cluster or "" for _, job in jobs}):
            own = {place: job for place, (_, job) in enumerate(jobs) if (job.cluster or "") == cluster}
            reports.update(zip(own, self._queue(cluster).report(list(own.values()), patience), strict=True))
        return [reports[place] for place in range(len(jobs))]

    def cancel(self, rundir: RunDir, job: Job, patience: float = PATIENCE_S) -> None:
        """scancel, for this very job: an id may have been given to another since. Raises BackendError."""
        report = self._queue(job.cluster).look(job)
        if report.state in ENDED_STATES or report.word == GONE:
            return
        answer = ask([*of_cluster("scancel", job.cluster), job.job_id], timeout=patience)
        if not answer.ok and not re.search("Invalid job id|already complet", answer.words):
            raise BackendError(f"scancel {job.job_id}: {answer.words}")

    def ended(self, rundir: RunDir, job: Job) -> bool:
        """Whether Slurm says that the job is over, or knows it no more; asked at most once a second."""
        key = (job.job_id, job.submitted)
        asked, over = self._ended.get(key, (0.0, False))
        if not over and time.monotonic() - asked >= _LOOK_S:
            report = self._queue(job.cluster).look(job)
            over = report.state in ENDED_STATES or report.word == GONE
            self._ended[key] = (time.monotonic(), over)
        return over

    def host(self, rundir: RunDir, node: str) -> str:
        """Slurm's name of the node, which is its host's nearly everywhere."""
        return node

    def step(self, job: Job, node: str) -> list[str]:
        """srun, beside the job's other steps, with none of its GPUs; for a minute at most."""
        return [*of_cluster("srun", job.cluster), f"--jobid={job.job_id}", f"--nodelist={node}", *_STEP]

    def check(self) -> list[Check]:
        """What of this cluster's configuration bears on runs."""
        from slurmfork.doctor import slurm

        return slurm.checks()

    def _queue(self, cluster: str | None) -> Queue:
        return Queue(cluster or None, directory=self._directory or shared_directory())


def _submit_time(job_id: str, cluster: str | None) -> float:
    """Slurm's own submit time of a job; this machine's clock where Slurm is slow to tell."""
    now = time.time()
    answer = ask([*of_cluster("scontrol", cluster), "show", "job", job_id], timeout=_SUBMIT_TIME_S)
    entry = slurm_records.from_scontrol(job_id, answer.output) if answer.ok else None
    return entry.submitted if entry and entry.submitted else now


def _nameless() -> list[str]:
    """Slurm takes jobs of a uid that nobody knows, and queues them again and again."""
    if account.known_name():
        return []
    uid = os.geteuid()
    return [f"uid {uid} has no name on this machine: where slurmctld has none for it either, the job never starts"]


def _refusal(answer: Answer, request: Request) -> str:
    """Why sbatch did not take the job, in its own words, with what may help."""
    words = answer.words or f"sbatch printed no job id but {answer.output.strip()[:200]!r}"
    return f"sbatch: {_PREFIX.sub('', words)}{_hint(words, request)}"


def _hint(words: str, request: Request) -> str:
    if re.search("invalid partition", words, re.IGNORECASE):
        partitions = sorted(set(ask(["sinfo", "-h", "-o", "%R"]).output.split()))
        return f"; there are: {', '.join(partitions)}" if partitions else ""
    if "Requested node configuration is not available" in words:
        return (
            f"; asked for were {request.nodes} nodes with {request.gpus_per_node} GPUs and "
            f"{request.cpus_per_node} CPUs each: `sinfo -o '%R %D %c %m %G'` shows what there is"
        )
    if re.search("parameter too long", words):
        return "; an option is longer than Slurm takes (1024 characters for most), or the script is too large"
    return ""
