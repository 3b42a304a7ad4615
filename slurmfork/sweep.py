"""The sweep: what is left of a run on this machine is found by journal, tag and log, and ended from outside.

``python -I .../sweep.py --run-dir DIR [--node N] [--grace S]`` prints a report as JSON; the batch script's exit trap,
the head, ``cancel`` and ``clean`` use it, and with ``--job CLUSTER ID`` in place of a directory an epilog. It believes
nothing that somebody else could have written, and never touches its caller or the processes above it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 2)[0])

import msgspec

from slurmfork import journal, names
from slurmfork.errors import RunDirError, SlurmforkError, UsageError
from slurmfork.killing import end_all
from slurmfork.process import Identity, alive, ancestors, boot_id, describe, owner, walk, walk_tagged
from slurmfork.rundir import RunDir, RunRecord, check_private
from slurmfork.scratch import of_job, remove_left
from slurmfork.shm import remove_named
from slurmfork.writers import walk_writers

BOUND_S = 10.0
DEFAULT_GRACE_S = 5.0
MAX_GRACE_S = 3600


@dataclass
class SweepReport:
    """What was ended, and what would not die, each in words; ``notes`` says what could not be looked at.

    ``node`` (None: all that this machine was) and ``boot_id`` say where, ``time`` (since the epoch) when.
    """

    node: str | None = field(default=None, compare=False)
    boot_id: str = field(default_factory=boot_id, compare=False)
    time: float = field(default_factory=time.time, compare=False)
    killed: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def sweep(
    rundir: Path,
    *,
    run_id: str,
    node: str | None,
    grace: float,
    spare: frozenset[int] = frozenset(),
    bound: float = BOUND_S,
) -> SweepReport:
    """End all that is left of a run here: SIGTERM, ``grace`` seconds, SIGKILL, ``bound`` seconds at most.

    ``node``: only what belongs to that node of the run. The caller, its ancestors and the PIDs in ``spare``
    are left alone. Raises RunDirError where the run directory is not this user's own.
    """
    report = SweepReport(node=node)
    recorded, logs = _recorded(rundir, node, report.notes)
    log_directory = _log_directory(rundir, run_id)
    # Whatever was found once: when its parent has ended nothing else may lead to it.
    known = {one: None for one in recorded if owner(one.pid) == os.geteuid() and alive(one)}
    job_id = _job_id(rundir)
    protected = spare | ancestors(os.getpid()) | {os.getpid()}

    def writers() -> Iterator[Identity]:
        if log_directory is not None:
            yield from walk_writers(log_directory, logs if node else None)

    def find() -> Iterator[Identity]:
        seen: set[Identity] = set()
        for source in (filter(alive, list(known)), walk_tagged(run_id, node, job_id=job_id), writers()):
            for one in _with_descendants(source, seen, protected):
                known[one] = None
                yield one

    outcome = end_all(find, grace=grace, bound=bound)
    report.killed = outcome.ended
    report.survivors = [describe(one) for one in outcome.survivors]
    if not report.survivors:
        for name in [node] if node else [path.stem for path in _journals(rundir, None, [])]:
            remove_left(run_id, name)
        remove_named(run_id)
    return report


def _with_descendants(roots: Iterable[Identity], seen: set[Identity], protected: frozenset[int]) -> Iterator[Identity]:
    """Each root and what is below it, once: what shed the tag may still have a parent that did not."""
    for root in roots:
        if root in seen or root.pid in protected:
            continue
        seen.add(root)
        yield root
        for one in walk(root.pid):
            if one not in seen and one.pid not in protected:
                seen.add(one)
                yield one


def _recorded(rundir: Path, node: str | None, notes: list[str]) -> tuple[list[Identity], set[str]]:
    """What the run's journals hold as not ended, and the names of the logs of all that they saw started."""
    living: list[Identity] = []
    logs: set[str] = set()
    for path in _journals(rundir, node, notes):
        try:
            records = journal.read(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"journal {path.name} was not used: {error.strerror}")
            continue
        if records.damaged:
            notes.append(f"journal {path.name} has {records.damaged} damaged lines")
        living += (one.identity for one in journal.living(records))
        logs |= {RunDir.log_name(record.worker) for record in records if isinstance(record, journal.Intent)}
    return living, logs


def _log_directory(rundir: Path, run_id: str) -> str | None:
    """Where the kernel says that the run's logs are; None where the directory is not this user's alone."""
    path = os.path.realpath(rundir)
    try:
        check_private(Path(path))
    except FileNotFoundError:  # removed; who has a log of it open still shows where it was
        pass
    except OSError:
        return None
    return f"{path}/logs" if os.path.basename(path) == run_id else None  # noqa: PTH119


def _journals(rundir: Path, node: str | None, notes: list[str]) -> list[Path]:
    here = RunDir(rundir)
    for path in (rundir, here.journals):
        try:
            check_private(path)
        except OSError as error:
            notes.append(f"no journal was used: {path}: {error.strerror}")
            return []
    if node is not None:
        return [here.journal(node)]
    return sorted(Path(entry.path) for entry in os.scandir(here.journals) if entry.name.endswith(".jsonl"))


def _job_id(rundir: Path) -> str | None:
    """The run's Slurm job: a job that one of its workers submitted inherits the tag, and is not swept."""
    try:
        record = RunDir(rundir).read_record(RunDir(rundir).record, RunRecord)
    except RunDirError:
        return None
    if record is None or record.backend != "slurm" or not record.job_id:
        return None
    return record.job_id


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sweep", description="End what is left of a run on this machine.")
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("--run-dir", type=Path, help="the run directory; its name is the run id")
    whose.add_argument("--job", nargs=2, metavar=("CLUSTER", "ID"), help="the job whose runs' agents were on this host")
    parser.add_argument("--node", help="only this node's processes")
    parser.add_argument("--grace", type=float, default=DEFAULT_GRACE_S, help="seconds between SIGTERM and SIGKILL")
    options = parser.parse_args(arguments)
    if options.node is not None and not names.NODE_PATTERN.fullmatch(options.node):
        raise UsageError(f"{options.node!r} is no name of a node")
    if not 0 <= options.grace <= MAX_GRACE_S:
        raise UsageError(f"--grace takes 0 to {MAX_GRACE_S} seconds, not {options.grace}")
    return options


def main(arguments: list[str]) -> int:
    """Sweep and print a report for each run; 1 if anything survived."""
    try:
        options = _options(arguments)
        runs = [(options.run_dir.absolute(), options.node)] if options.run_dir else of_job(*options.job)
        survived = [_sweep(run_dir, node, options.grace) for run_dir, node in runs]
    except SlurmforkError as error:
        print(f"slurmfork: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if any(survived) else 0


def _sweep(run_dir: Path, node: str | None, grace: float) -> bool:
    if not names.RUN_ID_PATTERN.fullmatch(run_dir.name):
        raise UsageError(f"{run_dir} is no run directory: its name is no run id")
    report = sweep(run_dir, run_id=run_dir.name, node=node, grace=grace)
    print(msgspec.json.encode(report).decode(), flush=True)
    return bool(report.survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
