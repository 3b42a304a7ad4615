"""The local backend: the batch script runs on this machine, in a session of its own that outlives the terminal.

A job is the script's process: its id is the PID, and ``local.json`` in the run directory holds the rest of its
identity and the machine, so that neither a reused PID nor another login node is mistaken for it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slurmfork import devices, killing, names, process
from slurmfork.backends.base import PATIENCE_S, Check, Job, JobReport
from slurmfork.errors import BackendError, RunDirError
from slurmfork.names import RunState
from slurmfork.process import Identity
from slurmfork.rundir import HeadRecord, RunDir

if TYPE_CHECKING:
    from slurmfork.plan import Request
    from slurmfork.spec import Spec

KILL_BOUND_S = 10.0
NO_DEVICES = "this machine shows no GPU: device numbers are those of the spec, and stand for nothing here"


class LocalJob(msgspec.Struct, kw_only=True):
    """``local.json``: the batch script's process and the machine that it runs on."""

    version: int = 1
    host: str
    pid: int
    start_time: int
    boot_id: str


class LocalBackend:
    """Runs batch scripts on this machine."""

    name = "local"

    def submit(self, rundir: RunDir, spec: Spec, request: Request) -> Job:
        """Start the batch script; raises PlanError if the machine's GPUs do not do, BackendError without bash."""
        devices.of_this_process(request.nodes, request.gpus_per_node)
        notes = []
        if request.gpus_per_node and not devices.present(os.environ) and spec.local.gpus_per_node is None:
            notes.append(NO_DEVICES)
        return self._begin(rundir, spec, notes)

    def _begin(self, rundir: RunDir, spec: Spec, notes: list[str]) -> Job:
        """Start the batch script; raises BackendError without bash."""
        log = os.open(rundir.batch_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            script = subprocess.Popen(
                ["bash", str(rundir.script)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=Path.cwd(),
                env=_outside(os.environ, spec.secrets),
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"cannot run bash: {error.strerror}") from None
        finally:
            os.close(log)
        identity = process.identify(script.pid)
        assert identity is not None  # it is our child, and not reaped
        record = LocalJob(host=os.uname().nodename, **identity._asdict())
        rundir.write_record(rundir.path / "local.json", record)
        script.returncode = 0  # it is meant to outlive us: no complaint that it still runs
        return Job(job_id=str(script.pid), submitted=time.time(), notes=notes)

    def started(self, rundir: RunDir) -> str | None:
        """The batch script's PID, if it was started."""
        record = rundir.read_record(rundir.path / "local.json", LocalJob)
        return str(record.pid) if record else None

    def report(self, jobs: Sequence[tuple[RunDir, Job]], patience: float = PATIENCE_S) -> list[JobReport]:
        """Whether each script still runs, as far as this machine can tell."""
        return [self._report(rundir) for rundir, _ in jobs]

    def _report(self, rundir: RunDir) -> JobReport:
        try:
            record = rundir.read_record(rundir.path / "local.json", LocalJob)
        except RunDirError as error:
            return JobReport(state=None, reason=str(error), fresh=time.time())
        if record is None:
            return JobReport(state=None, reason="the batch script was never started", fresh=time.time())
        if record.host != os.uname().nodename:
            return JobReport(state=None, reason=f"it runs on {record.host}, not here", fresh=time.time())
        if _alive(record):
            return JobReport(state=RunState.STARTING, word="RUNNING", fresh=time.time())
        reason = "the batch script is gone" + ("" if _same_boot(record) else " since the machine was restarted")
        return JobReport(state=RunState.FAILED, word="GONE", reason=reason, fresh=time.time())

    def cancel(self, rundir: RunDir, job: Job, patience: float = PATIENCE_S) -> None:
        """SIGTERM to the batch script, which passes it on to the head; if need be SIGKILL to both."""
        record = rundir.read_record(rundir.path / "local.json", LocalJob)
        if record is None:
            return
        if record.host != os.uname().nodename:
            raise BackendError(f"the run is on {record.host}: cancel it there")
        living = _living(rundir, record)
        for one in living[:1]:
            process.send(one, signal.SIGTERM)
        for one in living:
            process.send(one, signal.SIGCONT)  # as Slurm does: what is stopped would not hear
        if killing.wait_gone(living, patience):
            killing.end_all(lambda: _with_session(rundir, record), grace=0.0, bound=KILL_BOUND_S)

    def ended(self, rundir: RunDir, job: Job) -> bool:
        """Whether the processes of script and head are gone."""
        record = rundir.read_record(rundir.path / "local.json", LocalJob)
        return record is None or (record.host == os.uname().nodename and not _living(rundir, record))

    def host(self, rundir: RunDir, node: str) -> str:
        """The machine that the script was started on; this one where that is not known."""
        with contextlib.suppress(RunDirError):
            if record := rundir.read_record(rundir.path / "local.json", LocalJob):
                return record.host
        return os.uname().nodename

    def step(self, job: Job, node: str) -> list[str]:
        """There is none."""
        return []

    def check(self) -> list[Check]:
        """The devices of this machine."""
        found = devices.present(os.environ)
        shown = f"{len(found)} GPUs: {','.join(found)}" if found else "no GPU here; specs are tried with numbers alone"
        return [Check(name="local devices", ok=True, detail=shown)]


def _outside(environment: Mapping[str, str], secrets: Sequence[str]) -> dict[str, str]:
    """Without secrets, and what a Slurm job or another run around us has put there: its tag is not this run's."""
    dropped = {*secrets, *(names.WORKERS_OWN if names.WORKER in environment else ())}
    kept = (names.ROOT, names.DEVICE_FILES)
    return {
        name: value
        for name, value in environment.items()
        if name in kept or (name not in dropped and not name.startswith(("SLURM_", "SLURMFORK_")))
    }


def _identity(record: LocalJob) -> Identity:
    return Identity(record.pid, record.start_time, record.boot_id)


def _alive(record: LocalJob) -> bool:
    return process.alive(_identity(record))


def _living(rundir: RunDir, record: LocalJob) -> list[Identity]:
    """The batch script and the head, as far as they run: the head is ended by the script, unless that is gone."""
    found = [_identity(record)]
    with contextlib.suppress(RunDirError):
        if head := rundir.read_record(rundir.head, HeadRecord):
            found.append(Identity(head.pid, head.start_time, head.boot_id))
    return [one for one in found if process.alive(one)]


def _with_session(rundir: RunDir, record: LocalJob) -> Iterator[Identity]:
    """Script, head, and whatever else runs in the script's session."""
    yield from _living(rundir, record)
    if process.identify(record.pid) not in (None, _identity(record)):
        return  # its PID is another's, and so would be a session of that number
    for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        one = process.identify(pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if one and os.getsid(pid) == record.pid and process.alive(one):
                yield one


def _same_boot(record: LocalJob) -> bool:
    return record.boot_id == process.boot_id()
