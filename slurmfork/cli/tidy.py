"""Verbs that tidy up after runs that are over: clean what still runs, prune what is on disk."""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from slurmfork import aftermath, hints, rundir
from slurmfork.aftermath import Aftermath
from slurmfork.cli import output
from slurmfork.cli.options import RUN, Seconds, verb
from slurmfork.code.store import Store
from slurmfork.errors import Refused, RunDirError, SlurmforkError, UsageError
from slurmfork.observe import RunStatus
from slurmfork.run import Run, statuses
from slurmfork.rundir import unfinished_dirs
from slurmfork.spec.sizes import in_words

UNFINISHED = 3600.0  # seconds after which a directory that was begun is not going to be filled any more


@verb("clean", prints_data=True, examples=["slurmfork clean last", "slurmfork clean --all"])
@click.argument("run", metavar="[RUN]", type=RUN, required=False)
@click.option("--all", "every", is_flag=True, help="All runs that are over.")
def clean(run: str | None, every: bool, root: str | None, as_json: bool) -> int:
    """End whatever is left of runs that are over, on this machine, and say what would not die.

    What is left is found by the run's journals and by the run id in the environment of processes. Nodes that
    are other machines are named; run it there.
    """
    if (run is None) != every:
        raise UsageError("say which run to clean, or --all")
    found = [Run.load(run, root)] if run is not None else Run.all(root)
    judged = zip(found, statuses(found), strict=True)
    over = [one for one, (status, _) in judged if _is_over(one, status, skip=every)]
    swept: dict[str, Aftermath] = {}
    failed: dict[str, SlurmforkError] = {}
    for one in over:
        try:
            swept[one.run_id] = aftermath.sweep_run(one.rundir)
        except SlurmforkError as error:
            if not every:
                raise
            failed[one.run_id] = error
    if as_json:
        output.document(_document(swept, failed))
    for run_id, after in swept.items():
        _tell(run_id, after, as_json=as_json)
    for run_id, reason in failed.items():
        output.complain(f"{run_id}: {reason}")
    if every and not as_json:
        output.say(f"{output.plural(len(over), 'run')} looked at, {len(found) - len(over)} that may live left alone")
    return 1 if failed or any(after.survivors or after.unverified for after in swept.values()) else 0


def _is_over(run: Run, status: RunStatus, *, skip: bool) -> bool:
    """Whether a run is over; one that was named and is not is refused."""
    if status.over:
        return True
    if skip:
        return False
    # Its head is silent, and the scheduler's word may be some seconds old: that is worth asking anew.
    if status.source != "head" and run.job is not None and run.backend.ended(run.rundir, run.job):
        return True
    raise Refused(f"{status.run_id} is {status.state}; cancel it first", "not_over")


def _document(swept: dict[str, Aftermath], failed: dict[str, SlurmforkError]) -> dict[str, Any]:
    survivors = [line for after in swept.values() for line in after.survivors]
    return {
        "killed": [line for after in swept.values() for line in after.killed],
        "survivors": len(survivors),
        "details": survivors,
        "unverified": sorted({node for after in swept.values() for node in after.unverified}),
        "runs": [
            *(
                {"run_id": run_id, "killed": a.killed, "survivors": len(a.survivors), "unverified": a.unverified}
                for run_id, a in swept.items()
            ),
            *(
                {"run_id": run_id, "error": str(error), "kind": output.kind_of(error)}
                for run_id, error in failed.items()
            ),
        ],
    }


def _tell(run_id: str, after: Aftermath, *, as_json: bool) -> None:
    if not as_json:
        output.say(f"{run_id}: {output.plural(len(after.killed), 'process')} ended, {len(after.survivors)} left")
        for line in after.killed:
            output.say(f"  ended: {line}")
    for line in after.survivors:
        output.aside(f"  still alive: {line}")
    for note in after.notes:
        output.complain(f"{run_id}: {note}")
    if after.unverified:
        nodes = ", ".join(after.unverified)
        output.complain(f"{run_id}: cannot look at {nodes} from here; run {hints.command('clean', run_id)} there")


@verb("prune", prints_data=True, examples=["slurmfork prune", "slurmfork prune --older-than 7d --yes"])
@click.option("--older-than", type=Seconds(unit=True), default="30d", metavar="D", help="7d, 12h, 30m; 30d.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def prune(older_than: float, yes: bool, root: str | None, as_json: bool) -> int:
    """Remove the directories of runs that ended longer ago than D, with their logs.

    Code that came from elsewhere, and that no submit has asked for since D, goes too; runs have copies of their own. So
    does what submissions that were killed have begun and never filled.

    Never touches a run that is alive, or of which nobody knows whether it is. Should something of the others
    still run on this machine, it is ended first; if that fails, the directory is kept.
    """
    found = Run.all(root)
    judged = zip(found, statuses(found), strict=True)
    old = [one for one, (status, _) in judged if status.over and _quiet_for(one, status) >= older_than]
    if old and not yes:
        _ask(old)
    removed = [one.run_id for one in old if _nothing_left(one) and _remove(one)]
    for path in unfinished_dirs(rundir.root_of(root), older_than=UNFINISHED):
        with suppress(OSError):
            shutil.rmtree(path)
    objects, size = Store(rundir.root_of(root)).prune(older_than)
    if as_json:
        output.document({"removed": removed, "code": {"files": objects, "bytes": size}})
    else:
        sent = f", and {in_words(size)} of code that was sent and not used since" if objects else ""
        output.say(f"{output.plural(len(removed), 'run')} removed{sent}")
    return 0 if len(removed) == len(old) else 1


def _quiet_for(run: Run, status: RunStatus) -> float:
    """Seconds since the end of a run; where that was not recorded, since anything was written at its top."""
    ended = status.ended or max(_changed(path) for path in (run.rundir.path, run.rundir.batch_log, run.rundir.status))
    return time.time() - max(ended, run.record.submitted)


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _nothing_left(run: Run) -> bool:
    """Whether no process of the run is left here: the directory is the only record of what it started."""
    try:
        after = aftermath.sweep_run(run.rundir)
    except SlurmforkError as error:
        output.complain(f"{run.run_id} is kept: {error}")
        return False
    if after.survivors:
        output.complain(f"{run.run_id} is kept: {output.plural(len(after.survivors), 'process')} of it would not die")
    return not after.survivors


def _ask(doomed: list[Run]) -> None:
    if not sys.stdin.isatty():
        raise UsageError(f"{output.plural(len(doomed), 'run')} would be removed; --yes does it without asking")
    for run in doomed:
        output.aside(f"  {run.run_id}  submitted {output.since(run.record.submitted)} ago")
    click.confirm(f"Remove {output.plural(len(doomed), 'run')} with their logs?", abort=True, err=True)


def _remove(run: Run) -> bool:
    """Remove a run's directory; never through a link, never another user's."""
    path = run.rundir.path
    try:
        seen = path.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid():
            raise RunDirError(f"{path} is not a directory of yours")
        shutil.rmtree(path)
    except (OSError, SlurmforkError) as error:
        output.complain(f"{run.run_id} is kept: {error}")
        return False
    return True
