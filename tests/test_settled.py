"""Ends that are told before they are certain: by a head whose run Slurm then queues again, or has yet to speak of."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from slurmfork import run as runs
from slurmfork.backends.base import PATIENCE_S
from slurmfork.cli import attached, progress
from slurmfork.messages import WorkerView
from slurmfork.names import RunState
from slurmfork.observe import RunStatus
from slurmfork.run import Run
from slurmfork.rundir import EndRecord, RunDir, RunRecord

TOLD, SAID, QUEUED, OVER = (
    (RunState.CANCELLED, "head"),
    (RunState.STOPPING, "end"),
    (RunState.PENDING, "scheduler"),
    (RunState.FAILED, "end"),
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run that has ended from outside, of which nothing runs."""
    rundir = RunDir(tmp_path / "demo-abc234")
    rundir.make()
    record = RunRecord(run_id=rundir.run_id, name="demo", backend="local", submitted=time.time(), cwd="/", user="u")
    record.job_id, record.requeue = "1", True
    rundir.write_record(rundir.record, record)
    end = EndRecord(
        state=RunState.CANCELLED, reason="SIGTERM", exit_status=None, survivors=0, ended=time.time(), outside=True
    )
    rundir.write_record(rundir.end, end)
    return Run(rundir, record)


class Looks:
    """What looks at the run find, one after the other; the last for ever. Counts them, and how patient they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *found: tuple[RunState, str]) -> None:
        self.left = list(found)
        self.count = 0
        self.patience = 0.0
        monkeypatch.setattr(runs, "statuses", self.statuses)

    def statuses(self, asked: Sequence[Run], patience: float = PATIENCE_S) -> list[tuple[RunStatus, list[WorkerView]]]:
        self.count, self.patience = self.count + 1, max(self.patience, patience)
        state, source = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        one = asked[0]
        found = RunStatus(run_id=one.run_id, name="demo", backend="local", job_id="1", state=state, source=source)
        return [(found, [])]


class Screen:
    """Shows nothing."""

    lines = 0

    def say(self, *lines: str) -> None:
        pass

    def look(self, *, final: bool = False) -> None:
        pass

    @contextmanager
    def watched(self) -> Iterator[None]:
        yield


def test_a_run_that_is_queued_again_is_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head has called it cancelled, and recorded that a moment later."""
    Looks(monkeypatch, TOLD, SAID, QUEUED, OVER)
    assert run.wait().state is RunState.FAILED
    Looks(monkeypatch, TOLD, SAID, QUEUED, OVER)
    assert progress.until(run, "done", progress.Silent()).state is RunState.FAILED


def test_a_run_that_is_queued_again_is_followed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, TOLD, SAID, QUEUED, OVER)
    assert attached._to_the_end(run, Screen()) == 1  # type: ignore[arg-type]
    assert len(looks.left) == 1


@pytest.mark.timeout(60)
def test_a_wait_for_the_schedulers_word_has_its_limit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, TOLD, SAID)
    with pytest.raises(TimeoutError, match="is not done after 2 s"):
        run.wait(timeout=2)
    assert looks.patience <= 2  # the scheduler is not waited for any longer
    assert looks.count < 10, "a scheduler whose report is old is not asked on and on"


def test_who_follows_does_not_look_on_and_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Looks(monkeypatch, SAID)
    beginning = time.monotonic()

    class Ending(Screen):
        def look(self, *, final: bool = False) -> None:
            if time.monotonic() > beginning + 2:
                looks.left = [OVER]

    assert attached._to_the_end(run, Ending()) == 1  # type: ignore[arg-type]
    assert looks.count < 6


def test_a_cancel_of_a_run_that_may_come_back_removes_its_secrets(run: Run) -> None:
    """Which were kept for its next attempt."""
    run.rundir.secrets.parent.mkdir(parents=True, exist_ok=True)
    run.rundir.write(run.rundir.secrets, b"{}")
    assert run.cancel().state is RunState.CANCELLED
    assert not run.rundir.secrets.exists()
