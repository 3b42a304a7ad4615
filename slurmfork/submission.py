"""Submission: from a spec to a filled run directory and a job; what is refused has left nothing behind.

Where the scheduler did not say whether it took the job, the run directory stays: the job would need it.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from slurmfork import backends, hints, installation, rundir
from slurmfork.errors import Unanswered, UsageError
from slurmfork.run import Run
from slurmfork.rundir import RunDir, RunRecord
from slurmfork.spec import Spec

if TYPE_CHECKING:
    from slurmfork.code.provision import Provision


def submit(
    spec: Spec | str | os.PathLike[str],
    *,
    backend: str | None = None,
    root: str | os.PathLike[str] | None = None,
    template: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    code: str | None = None,
) -> Run:
    """Submit a spec (or the path of one) and return the run, which is pending then.

    ``overrides`` are ``key=value`` as with ``--set``; secrets are read from ``environment`` (default: this
    process's). ``code`` names what was sent from elsewhere before, in place of the spec's own directory. Raises
    SpecError, PlanError, RunDirError, BackendError; then nothing was submitted, unless it is Unanswered: the run
    directory is kept then, and the message names the run.
    """
    from slurmfork import plan, render

    if not isinstance(spec, (Spec, str, os.PathLike)):
        raise UsageError(f"spec is a Spec, or the path of one; not {spec!r}")
    if isinstance(overrides, str):
        raise UsageError(f"overrides is a list of key=value, not the text {overrides!r}")
    source = None if isinstance(spec, Spec) else Path(spec)
    spec = _read(spec, overrides, backend)
    values = secrets(spec, os.environ if environment is None else environment)
    asked = plan.request(spec)
    giver = backends.get(spec.backend)
    place = rundir.root_of(root)
    provision = _provision(spec, code, place)
    directory = _new_rundir(place, spec.name)
    script = render.render(
        spec,
        run_id=directory.run_id,
        run_dir=directory.path,
        request=asked,
        python=installation.python(),
        package=Path(__file__).resolve().parent,
        template=Path(template) if template else None,
    )
    record = RunRecord(
        run_id=directory.run_id,
        name=spec.name,
        backend=spec.backend,
        submitted=time.time(),
        cwd=str(directory.code if provision else Path.cwd()),
        user=getpass.getuser(),
        nodes=asked.nodes,
        requeue=spec.requeue and spec.backend == "slurm",
        code=provision.record if provision else None,
    )
    try:
        if provision:
            provision.lay(directory.code)
        _fill(directory, spec, script, record, values, source)
        installation.note_use(str(directory.path))
        job = giver.submit(directory, spec, asked)
    except Unanswered as error:
        run_id = directory.run_id
        raise Unanswered(
            f"{error}, so run {run_id} is kept: {hints.command('status', run_id)} tells if it starts, "
            f"{hints.command('cancel', run_id)} gives it up"
        ) from None
    except BaseException:
        _remove(directory)
        raise
    record.job_id, record.cluster, record.submitted = job.job_id, job.cluster, job.submitted
    directory.write_record(directory.record, record)
    return Run(directory, record, notes=[*job.notes, *(provision.notes if provision else ())])


def _read(spec: Spec | str | os.PathLike[str], overrides: Sequence[str], backend: str | None) -> Spec:
    if not isinstance(spec, Spec):
        from slurmfork.spec import reader

        return reader.load(Path(spec), overrides=list(overrides), backend=backend)
    if overrides or backend:
        raise UsageError("overrides and backend go with the path of a spec; change a Spec itself instead")
    return spec


def _provision(spec: Spec, sent: str | None, root: Path) -> Provision | None:
    """The code that goes along, looked at before anything is made."""
    if spec.code is None:
        return None
    from slurmfork.code.provision import Provision

    return Provision.sent(sent, root) if sent else Provision.here(spec.code, root)


def _new_rundir(root: Path, name: str) -> RunDir:
    directory = RunDir(root / rundir.new_run_id(name))
    directory.make()
    return directory


def _fill(
    directory: RunDir,
    spec: Spec,
    script: str,
    record: RunRecord,
    values: dict[str, str],
    source: Path | None,
) -> None:
    directory.write_record(directory.record, record)  # first: by it the verbs know the directory, whoever dies now
    directory.write(directory.spec, spec.to_json())
    directory.write(directory.script, script.encode(), executable=True)
    if source is not None:
        directory.write(directory.source, source.read_bytes())
    if values:
        directory.write(directory.secrets, msgspec.json.encode(values))


def _remove(directory: RunDir) -> None:
    import shutil

    shutil.rmtree(directory.path, ignore_errors=True)


def secrets(spec: Spec, environment: Mapping[str, str]) -> dict[str, str]:
    """The values of the spec's secrets; raises UsageError, naming those that the environment does not have."""
    missing = [name for name in spec.secrets if name not in environment]
    if missing:
        raise UsageError(f"secrets not set in the environment: {', '.join(missing)}; export them, then submit again")
    return {name: environment[name] for name in spec.secrets}
