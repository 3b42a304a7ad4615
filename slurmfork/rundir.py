"""The run directory: the name of every file in it, and the two safe ways to write one.

Each file has one writer. Files are replaced by rename or appended to, never edited in place, so that a reader
on another node sees either the old or the new. Everything is private to the user (0700 and 0600), whatever
the umask.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from slurmfork import hints, names
from slurmfork.errors import RunDirError, RunNotFound, UsageError

T = TypeVar("T")

_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"


class GitRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What git said of a run's code. ``changed``: git's two letters and a path each, ``more`` of them left out."""

    commit: str | None
    branch: str | None
    dirty: bool
    changed: list[str] = []
    more: int = 0


class CodeRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Where a run's code came from. ``size`` in bytes."""

    source: str
    host: str
    files: int
    size: int
    git: GitRecord | None = None


class RunRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``run.json``: what the submitter knows of a run. Times are seconds since the epoch."""

    version: int = 1
    run_id: str
    name: str
    backend: str
    submitted: float
    cwd: str
    user: str
    job_id: str | None = None
    cluster: str | None = None
    nodes: int | None = None
    requeue: bool = False
    code: CodeRecord | None = None


class HeadRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``head.json``: where the head listens. ``addresses`` are tried in order by clients."""

    version: int = 1
    addresses: list[str]
    port: int
    node: str
    pid: int
    boot_id: str
    start_time: int
    started: float
    attempt: int = 0
    job_id: str | None = None


class EndRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """``end.json``: how the run ended, in the words of its head; the last thing that it writes.

    ``survivors`` counts processes that could not be ended; ``unverified`` names nodes that could not be asked.
    ``outside``: it was ended by a signal from outside, and the scheduler may know better why.
    """

    version: int = 1
    state: names.RunState
    reason: str
    exit_status: int | None
    survivors: int
    ended: float
    unverified: list[str] = []
    outside: bool = False


class RunDir:
    """Paths of one run, and reading and writing of its records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"RunDir({str(self.path)!r})"

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def record(self) -> Path:
        """run.json, written by the submitter."""
        return self.path / "run.json"

    @property
    def spec(self) -> Path:
        """spec.json, the resolved spec."""
        return self.path / "spec.json"

    @property
    def source(self) -> Path:
        """spec.yaml, the user's own text."""
        return self.path / "spec.yaml"

    @property
    def script(self) -> Path:
        """batch.sh, the rendered batch script."""
        return self.path / "batch.sh"

    @property
    def batch_log(self) -> Path:
        """Output of the batch script and of the head."""
        return self.path / "batch.log"

    @property
    def batch_status(self) -> Path:
        """Exit status of the batch script, written by its exit trap: there even if no head ever started."""
        return self.path / "batch.status"

    @property
    def head(self) -> Path:
        return self.path / "head.json"

    @property
    def status(self) -> Path:
        """status.json, the head's last picture of the run."""
        return self.path / "status.json"

    @property
    def events(self) -> Path:
        """events.jsonl, appended to by the head."""
        return self.path / "events.jsonl"

    @property
    def end(self) -> Path:
        return self.path / "end.json"

    @property
    def requeued(self) -> Path:
        """There while the job of a run that ended is in the queue again."""
        return self.path / "requeued"

    @property
    def sweeps(self) -> Path:
        """sweep.jsonl, a report for each sweep that was run at the end."""
        return self.path / "sweep.jsonl"

    @property
    def code(self) -> Path:
        """The code that was sent along, if any: the working directory of the workers."""
        return self.path / "code"

    @property
    def credentials(self) -> Path:
        return self.path / "credentials"

    @property
    def secrets(self) -> Path:
        """secrets.json: values of the spec's secrets; 0600, removed when the run ends."""
        return self.path / "credentials" / "secrets.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def worker_log(self, role: str, index: int) -> Path:
        return self.logs / self.log_name(f"{role}/{index}")

    @staticmethod
    def log_name(worker: str) -> str:
        """The name of the log of a worker (``role/index``)."""
        return f"{worker.replace('/', '-')}.log"

    @property
    def agents(self) -> Path:
        return self.path / "agents"

    def agent_log(self, node: str) -> Path:
        return self.agents / f"{node}.log"

    @property
    def journals(self) -> Path:
        return self.path / "journal"

    def journal(self, node: str) -> Path:
        return self.journals / f"{node}.jsonl"

    def make(self) -> None:
        """Create the directory tree, private; raises RunDirError if it exists or cannot be written."""
        try:
            make_private(self.path.parent)
            for path in (self.path, self.credentials, self.logs, self.agents, self.journals):
                path.mkdir(mode=0o700)
                path.chmod(0o700)
            check_private(self.path)
        except OSError as error:
            raise RunDirError(
                f"cannot create the run directory {self.path}: {error.strerror}; "
                "choose a directory on the shared file system with --root or SLURMFORK_ROOT"
            ) from None

    def write(self, path: Path, data: bytes, *, executable: bool = False) -> None:
        """Replace ``path`` atomically with ``data``, mode 0600 (0700 if executable); raises RunDirError."""
        try:
            replace_file(path, data, mode=0o700 if executable else 0o600)
        except OSError as error:
            raise RunDirError(f"cannot write {path}: {error.strerror}") from None

    def write_record(self, path: Path, record: Any) -> None:
        """Replace ``path`` with a struct as indented JSON."""
        self.write(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")

    def read_record(self, path: Path, kind: type[T]) -> T | None:
        """Read a struct back; None where the file is not there (yet). Raises RunDirError for nonsense."""
        try:
            with open(path, "rb", buffering=0) as file:  # `status` reads thousands
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunDirError(f"cannot read {path}: {error.strerror}") from None
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RunDirError(f"{path} is damaged: {error}") from None


def replace_file(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write ``data`` beside ``path`` and rename it there; the mode holds whatever the umask is.

    ``durable``: on the disk before it is renamed. What is written again soon need not be.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            if durable:
                os.fsync(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_private(path: Path) -> None:
    """Make a directory, and what is missing above it: whoever could write there could put another in its place."""
    if not path.is_dir():
        make_private(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)


def is_private(facts: os.stat_result) -> bool:
    """Whether this is a real directory of this user, and only this user can write to it."""
    shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not shared


def check_private(path: Path) -> None:
    """Raise RunDirError for what somebody else could have put there, OSError where nothing is."""
    if not is_private(path.lstat()):
        raise RunDirError(
            f"{path} is not a directory that only you can write to, so it is not believed; "
            "if it is yours, `chmod go-w` makes it so"
        )


def default_root() -> Path:
    """SLURMFORK_ROOT, or ~/.slurmfork/runs: where run directories live."""
    value = os.environ.get(names.ROOT)
    return _place(value) if value else Path.home() / ".slurmfork" / "runs"


def root_of(given: str | os.PathLike[str] | None) -> Path:
    """Where run directories live: the place that was given, else the default."""
    return _place(given) if given else default_root()


def _place(given: str | os.PathLike[str]) -> Path:
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError:
        raise RunDirError(f"{given}: there is no such user") from None


def new_run_id(name: str) -> str:
    """A run id: the spec's name and six random letters, so that it is short enough to type."""
    return name + "-" + "".join(secrets.choice(_ALPHABET) for _ in range(6))


def run_dirs(root: Path) -> Iterator[RunDir]:
    """Every run directory under ``root`` that is this user's alone (others are not to be believed)."""
    try:
        entries = list(os.scandir(root))
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunDirError(f"cannot read {root}: {error.strerror}") from None
    for entry in entries:
        rundir = RunDir(Path(entry.path))
        if names.RUN_ID_PATTERN.fullmatch(entry.name) and _is_run(rundir):
            yield rundir


def unfinished_dirs(root: Path, *, older_than: float) -> Iterator[Path]:
    """Directories of submissions that were killed before they had a record; unchanged for ``older_than`` seconds."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(root)):
            rundir = RunDir(Path(entry.path))
            if not names.RUN_ID_PATTERN.fullmatch(entry.name) or rundir.record.exists():
                continue
            facts = rundir.path.lstat()
            known = {path.name for path in (rundir.credentials, rundir.logs, rundir.agents, rundir.journals)}
            if (
                is_private(facts)
                and time.time() - facts.st_mtime >= older_than
                and {path.name for path in rundir.path.iterdir()} <= known
            ):
                yield rundir.path


def _is_run(rundir: RunDir) -> bool:
    with contextlib.suppress(OSError):
        return is_private(rundir.path.lstat()) and rundir.record.exists()
    return False


def find(root: Path, wanted: str) -> RunDir:
    """The run that ``wanted`` names: a run id, a unique prefix of one, a job id, or ``last``.

    Raises RunNotFound where there is none, or more than one, UsageError for no name at all, RunDirError for one that
    is not this user's alone.
    """
    if not wanted.strip():  # as from a variable that is not set: it would be the beginning of any run's id
        raise UsageError("the name of the run is empty: give a run id, the beginning of one, a job id, or `last`")
    if not names.RUN_ID_PATTERN.fullmatch(wanted):
        return _search(root, wanted)
    exact = RunDir(root / wanted)
    if _is_run(exact):
        return exact
    try:
        return _search(root, wanted)  # so that nobody can hide a run by a directory of the name that it is called
    except RunNotFound:
        with contextlib.suppress(OSError):
            check_private(exact.path)
        raise


def _search(root: Path, wanted: str) -> RunDir:
    runs = {rundir.run_id: rundir for rundir in run_dirs(root)}
    if not runs:
        raise RunNotFound(f"there is no run under {root} (--root and SLURMFORK_ROOT choose another place)")
    records = {run_id: record for run_id, rundir in runs.items() if (record := _readable(rundir)) is not None}
    by_age = sorted(records, key=lambda run_id: records[run_id].submitted)
    if wanted == "last" and by_age:
        return runs[by_age[-1]]
    by_job = [run_id for run_id in by_age if records[run_id].job_id == wanted]
    if by_job:  # job ids are reused after a reset of Slurm: the latest is meant
        return runs[by_job[-1]]
    matches = sorted(run_id for run_id in runs if run_id.startswith(wanted))
    if len(matches) == 1:
        return runs[matches[0]]
    if matches:
        shown = ", ".join(matches[:5]) + (" ..." if len(matches) > 5 else "")
        raise RunNotFound(f"{wanted!r} could be any of {len(matches)} runs: {shown}")
    raise RunNotFound(f"no run {wanted!r} under {root}; {hints.command('status')} lists the runs that there are")


def _readable(rundir: RunDir) -> RunRecord | None:
    """The record of a run; None where it is damaged or another run's, which must not hide the other runs."""
    with contextlib.suppress(RunDirError):
        record = rundir.read_record(rundir.record, RunRecord)
        return record if record and record.run_id == rundir.run_id else None
    return None
