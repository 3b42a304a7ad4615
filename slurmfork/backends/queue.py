"""Slurm's word on jobs, asked seldom: one squeue for all of a user's runs, its answer shared by all.

The answer lies in a private file on this machine, under a lock: however many processes ask, squeue runs once
in ``INTERVAL_S``. A job that squeue has dropped is looked up with sacct and scontrol; what is final is kept
for good. No answer, an empty one, and one about another job of that id are "don't know", never "gone".
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from slurmfork import account
from slurmfork.backends import slurm_records
from slurmfork.backends.base import PATIENCE_S, Job, JobReport
from slurmfork.backends.slurm_commands import Answer, ask, of_cluster
from slurmfork.backends.slurm_records import Entry
from slurmfork.backends.slurm_reports import is_same, key_of, latest_of, report_of
from slurmfork.backends.slurm_states import run_state
from slurmfork.errors import RunDirError
from slurmfork.names import ENDED_STATES
from slurmfork.rundir import replace_file
from slurmfork.userdir import user_directory

INTERVAL_S = 10.0
UNKNOWN_S = 60.0  # how long a job that nobody knew is not asked for again
LOOK_S = 10.0
STALE_S = 60.0  # an older answer is not given while another process asks; the new one is waited for
LATE_S = 5.0  # a job submitted so shortly before squeue was asked may not have been seen
KEPT = 2000
GONE = "gone"  # our own word, for what slurmctld says to know no more


class Cache(msgspec.Struct):
    """What is known, and when it was asked. ``tried`` is the last time, ``asked`` the last good one."""

    tried: float = 0.0
    asked: float = 0.0
    error: str = ""
    jobs: dict[str, Entry] = {}
    final: dict[str, JobReport] = {}
    unknown: dict[str, tuple[float, str]] = {}


class Queue:
    """One cluster's queue. ``directory``: where the shared file lies; None: nothing is shared."""

    def __init__(self, cluster: str | None, *, directory: Path | None, interval: float = INTERVAL_S) -> None:
        self._cluster = cluster
        self._interval = interval
        self._deadline = 0.0
        place = f"{os.environ.get('SLURM_CONF', '')}\n{cluster or ''}"
        key = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()[:12]
        self._file = directory / f"squeue-{key}.json" if directory else None

    def report(self, jobs: Sequence[Job], patience: float = PATIENCE_S) -> list[JobReport]:
        """What is known of each job, in their order; at most one squeue, none if another process asked just now.

        Slurm is asked for ``patience`` seconds at most, whatever there is to be asked.
        """
        self._deadline = time.monotonic() + patience
        with self._shared() as (cache, mine):
            if mine and any(key_of(job) not in cache.final for job in jobs):
                self._refresh(cache)
                self._settle(jobs, cache)
            return [_report(job, cache) for job in jobs]

    def look(self, job: Job) -> JobReport:
        """What slurmctld says of one job now: for those who wait for its end."""
        self._deadline = time.monotonic() + LOOK_S
        with self._shared(patient=False) as (cache, mine):
            if key_of(job) not in cache.final:
                entry, words = self._show(job)
                if entry is None and "Invalid job id" in words:
                    return JobReport(state=None, word=GONE, reason=words, fresh=time.time())
                if entry is not None and not is_same(job, entry):
                    reason = f"Slurm has given the id {job.job_id} to another job since"
                    return JobReport(state=None, word=GONE, reason=reason, fresh=time.time())
                self._learn(job, entry, cache)
                if not mine and entry is not None:
                    return report_of(entry, time.time())
            return _report(job, cache)

    # --- asking

    @property
    def _left(self) -> float:
        """Seconds that are left for asking."""
        return max(0.0, self._deadline - time.monotonic())

    def _ask(self, argv: Sequence[str]) -> Answer:
        if left := self._left:
            return ask(argv, timeout=left)
        return Answer(False, "", f"{argv[0]} was not asked: there was no time left")

    def _refresh(self, cache: Cache) -> None:
        now = time.time()
        if 0 <= now - cache.tried < self._interval:
            return
        user = account.known_name()  # squeue refuses a uid that has none
        mine = ["-u", user] if user else []
        argv = [*of_cluster("squeue", self._cluster), "-h", *mine, "-t", "all"]
        answer = self._ask([*argv, "-o", slurm_records.SQUEUE_FORMAT])
        cache.tried = time.time()
        cache.error = "" if answer.ok else answer.words
        if answer.ok:
            cache.asked, cache.jobs = now, slurm_records.from_squeue(answer.output)

    def _settle(self, jobs: Iterable[Job], cache: Cache) -> None:
        """Look further for jobs that are over or missing in squeue's answer."""
        now = time.time()
        missing = []
        for job in jobs:
            entry = cache.jobs.get(job.job_id)
            if key_of(job) in cache.final or _is_recent(job, cache):
                continue
            if entry is not None and is_same(job, entry):
                if run_state(entry.word) in ENDED_STATES:
                    shown, _ = self._show(job)  # squeue has no exit status
                    if shown is not None or self._left:
                        self._learn(job, shown or entry, cache)
            elif not cache.error and now - cache.unknown.get(key_of(job), (0.0, ""))[0] > UNKNOWN_S:
                missing.append(job)
        if missing:
            self._find(missing, cache)

    def _find(self, jobs: list[Job], cache: Cache) -> None:
        """Jobs that squeue does not list: accounting may know them, or slurmctld after all."""
        ids = ",".join(job.job_id for job in jobs)
        argv = [*of_cluster("sacct", self._cluster), "-X", "-n", "-P", "-D", "-j", ids]
        answer = self._ask([*argv, "-o", slurm_records.SACCT_FORMAT])
        rows = list(slurm_records.from_sacct(answer.output)) if answer.ok else []
        for job in jobs:
            entry = latest_of(job, rows)
            if entry is None or run_state(entry.word) not in ENDED_STATES:
                shown, words = self._show(job)
                said = f"accounting says {entry.word}" if entry else f"sacct: {answer.words or 'no such job'}"
                if not self._left:
                    return  # nobody was asked in vain: the next one may ask
                if shown is None or not is_same(job, shown):
                    words = words or "another job has that id now"
                    reason = f"squeue does not list the job ({said}; scontrol: {words})"
                    cache.unknown[key_of(job)] = (time.time(), reason)
                    continue
                entry = shown
            self._learn(job, entry, cache)

    def _show(self, job: Job) -> tuple[Entry | None, str]:
        answer = self._ask([*of_cluster("scontrol", self._cluster), "show", "job", job.job_id])
        return (slurm_records.from_scontrol(job.job_id, answer.output) if answer.ok else None), answer.words

    def _learn(self, job: Job, entry: Entry | None, cache: Cache) -> None:
        if entry is None or not is_same(job, entry):
            return
        if run_state(entry.word) in ENDED_STATES:
            cache.final[key_of(job)] = report_of(entry, time.time())
        else:
            cache.jobs[job.job_id] = entry
        cache.unknown.pop(key_of(job), None)

    # --- the shared file

    @contextlib.contextmanager
    def _shared(self, *, patient: bool = True) -> Iterator[tuple[Cache, bool]]:
        """The cache, and whether it is ours to fill: not while another process does, whose answer will do."""
        with contextlib.ExitStack() as stack:
            lock = self._open_lock()
            stale = time.time() - self._load().asked > STALE_S
            mine = lock is None or stack.enter_context(_locked(lock, self._left if patient and stale else 0.0))
            cache = self._load()
            before = msgspec.json.encode(cache)
            yield cache, mine
            if mine and self._file is not None and msgspec.json.encode(cache) != before:
                self._save(cache)

    def _open_lock(self) -> int | None:
        if self._file is None:
            return None
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._file.with_suffix(".lock"), flags, 0o600)
        except OSError:
            self._file = None
            return None

    def _load(self) -> Cache:
        with contextlib.suppress(OSError, msgspec.MsgspecError, TypeError):
            if self._file is not None:
                descriptor = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with open(descriptor, "rb") as file:
                    if os.fstat(descriptor).st_uid == os.geteuid():
                        return msgspec.json.decode(file.read(), type=Cache)
        return Cache()

    def _save(self, cache: Cache) -> None:
        for kept in (cache.final, cache.unknown):
            for key in list(kept)[:-KEPT]:
                del kept[key]
        with contextlib.suppress(OSError):
            replace_file(self._file, msgspec.json.encode(cache)) if self._file else None


@contextlib.contextmanager
def _locked(descriptor: int, patience: float) -> Iterator[bool]:
    """Whether the lock was had, within ``patience`` seconds: another process may be asking Slurm."""
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    yield False
                    return
                time.sleep(0.05)  # flock has no waiting with a deadline
        yield True
    finally:
        os.close(descriptor)


def shared_directory() -> Path | None:
    """Where this user's processes on this machine share answers; None if there is no place to be trusted."""
    try:
        return user_directory()
    except RunDirError:
        return None


def _is_recent(job: Job, cache: Cache) -> bool:
    """Whether squeue may have been asked before the job was there to be seen."""
    return job.job_id not in cache.jobs and job.submitted > cache.asked - LATE_S


def _report(job: Job, cache: Cache) -> JobReport:
    if final := cache.final.get(key_of(job)):
        return final
    entry = cache.jobs.get(job.job_id)
    if entry is not None and is_same(job, entry):
        return report_of(entry, cache.asked)
    now = time.time()
    if _is_recent(job, cache):
        reason = cache.error or f"submitted {max(0.0, now - job.submitted):.0f} s ago"
    elif entry is not None:
        reason = f"Slurm has given the id {job.job_id} to another job since"
    else:
        reason = cache.error or cache.unknown.get(key_of(job), (0.0, "squeue does not list the job"))[1]
    return JobReport(state=None, reason=reason, fresh=cache.asked or now)
