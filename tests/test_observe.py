"""What is said of a run of which no head answers, from its files and its scheduler's word."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from slurmfork.backends.base import JobReport
from slurmfork.messages import StatusView
from slurmfork.names import RunState
from slurmfork.observe import LATE_WORD, Observation
from slurmfork.rundir import EndRecord, RunDir, RunRecord


def completed(ago: float) -> JobReport:
    """What Slurm says of a job that ended well so many seconds ago."""
    now = time.time()
    return JobReport(state=RunState.COMPLETED, word="COMPLETED", exit_status=0, fresh=now, ended=now - ago)


@pytest.fixture
def look(tmp_path: Path) -> Observation:
    """A look at a run of Slurm's that has nothing but its record."""
    rundir = RunDir(tmp_path / "demo-abc234")
    rundir.make()
    record = RunRecord(run_id=rundir.run_id, name="demo", backend="slurm", submitted=time.time(), cwd="/", user="u")
    record.job_id = "17"
    return Observation(rundir, record)


def test_a_script_that_ended_well_without_a_head_has_failed(look: Observation) -> None:
    """As with `setup: exec sleep 3`. What a compute node wrote just before may not be seen yet."""
    status, _ = look.look(completed(1.0))
    assert (status.state, status.over, status.exit_status) == (RunState.STOPPING, False, None)
    status, _ = look.look(completed(LATE_WORD))
    assert (status.state, status.exit_status) == (RunState.FAILED, 1)
    assert "without having started a head" in status.reason


def test_an_end_that_was_recorded_since_the_first_look_counts(look: Observation) -> None:
    end = EndRecord(state=RunState.COMPLETED, reason="all done", exit_status=0, survivors=0, ended=time.time())
    look.rundir.write_record(look.rundir.end, end)
    status, _ = look.look(completed(1.0))
    assert (status.state, status.source, status.reason) == (RunState.COMPLETED, "end", "all done")


def test_a_head_that_left_between_two_looks_has_recorded_its_end(look: Observation) -> None:
    """What it saved last says that the run is over; the end record says what more there is to know."""
    ended = time.time()
    look.rundir.write_record(look.rundir.status, StatusView(run_id="demo-abc234", state=RunState.CANCELLED))
    end = EndRecord(state=RunState.CANCELLED, reason="SIGTERM", exit_status=None, survivors=0, ended=ended)
    end.outside = True
    look.rundir.write_record(look.rundir.end, end)
    status, _ = look.look(JobReport(state=RunState.STOPPING, word="COMPLETING", fresh=ended))
    assert (status.state, status.source) == (RunState.STOPPING, "end")


def test_without_a_word_of_the_scheduler_nothing_is_claimed(look: Observation) -> None:
    reason = "squeue did not answer within 5 s"
    status, _ = look.look(JobReport(state=None, reason=reason, fresh=time.time()))
    assert (status.state, status.source, status.reason) == (RunState.PENDING, "submit", reason)


def test_an_end_from_outside_is_over_when_the_scheduler_has_said_why(look: Observation) -> None:
    """While Slurm completes a job it does not say that it was preempted; what is told as over is not taken back."""
    ended = time.time()
    end = EndRecord(
        state=RunState.CANCELLED, reason="SIGTERM", exit_status=None, survivors=0, ended=ended, outside=True
    )
    look.rundir.write_record(look.rundir.end, end)
    look = Observation(look.rundir, look.record)
    status, _ = look.look(JobReport(state=RunState.STOPPING, word="COMPLETING", fresh=ended))
    assert (status.state, status.over, status.ended) == (RunState.STOPPING, False, None)
    assert status.reason == "SIGTERM; the scheduler has yet to say why"
    status, _ = look.look(JobReport(state=RunState.PREEMPTED, word="PREEMPTED", fresh=ended))
    assert (status.state, status.reason) == (RunState.PREEMPTED, "Slurm ended the job: PREEMPTED")
    status, _ = look.look(JobReport(state=RunState.CANCELLED, word="CANCELLED", fresh=ended))
    assert (status.state, status.reason) == (RunState.CANCELLED, "SIGTERM")
    status, _ = look.look(None)  # nobody to ask
    assert status.state is RunState.CANCELLED
    assert look.end is not None
    look.end.ended += 3600  # by the clock of a node that is ahead of ours
    status, _ = look.look(JobReport(state=RunState.STOPPING, word="COMPLETING", fresh=ended))
    assert status.state is RunState.CANCELLED
    look.end.ended = ended - 61  # Slurm may take minutes until it has given up on a node that is lost
    status, _ = look.look(JobReport(state=RunState.STOPPING, word="COMPLETING", fresh=ended))
    assert (status.state, status.reason) == (RunState.CANCELLED, "SIGTERM")


def test_a_node_that_failed_is_named(look: Observation) -> None:
    """Slurm's steps hear but SIGTERM of it, so that the head records an end from outside, and whom it could not ask."""
    end = EndRecord(state=RunState.CANCELLED, reason="SIGTERM", exit_status=None, survivors=0, ended=time.time())
    end.outside, end.unverified = True, ["n2"]
    look.rundir.write_record(look.rundir.end, end)
    word = JobReport(state=RunState.NODE_FAIL, word="NODE_FAIL", exit_status=1, fresh=time.time(), ended=time.time())
    status, _ = look.look(word)
    assert status.state is RunState.NODE_FAIL
    assert status.reason == "Slurm ended the job: NODE_FAIL; n2 did not answer at the end"
