"""What Slurm's words and records mean: no Slurm is needed to read what one has printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rendering import make_spec

from slurmfork.backends import slurm_records
from slurmfork.backends.base import Job
from slurmfork.backends.slurm_commands import one_line
from slurmfork.backends.slurm_environment import environment, environment_of_job
from slurmfork.backends.slurm_options import ignored
from slurmfork.backends.slurm_records import Entry, from_sacct, from_scontrol, from_squeue
from slurmfork.backends.slurm_reports import is_same, latest_of, report_of
from slurmfork.backends.slurm_states import exit_status, pending_reason, run_state
from slurmfork.names import ENDED_STATES, RunState

STATES = {
    "PENDING": "pending",
    "RUNNING": "starting",
    "SUSPENDED": "starting",
    "COMPLETED": "completed",
    "CANCELLED": "cancelled",
    "FAILED": "failed",
    "TIMEOUT": "timeout",
    "NODE_FAIL": "node_fail",
    "PREEMPTED": "preempted",
    "BOOT_FAIL": "node_fail",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "failed",
}
FLAGS = [
    "COMPLETING",
    "STAGE_OUT",
    "CONFIGURING",
    "EXPEDITING",
    "RESIZING",
    "REQUEUED_CRON",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "SPECIAL_EXIT",
    "STOPPED",
    "REVOKED",
    "RESV_DEL_HOLD",
    "SIGNALING",
    "POWER_UP_NODE",
]


@pytest.mark.parametrize(("word", "state"), STATES.items())
def test_base_states(word: str, state: str) -> None:
    assert run_state(word) == RunState(state)


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_is_the_end(flag: str) -> None:
    assert run_state(flag) not in ENDED_STATES
    assert (run_state(flag) is None) == (flag == "REVOKED")


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CANCELLED by 1000", RunState.CANCELLED),
        ("CANCELLED+", RunState.CANCELLED),
        ("OUT_OF_ME+", RunState.FAILED),
        ("COMPLETIN+", RunState.STOPPING),
        ("COMPLET+", None),  # COMPLETED, or COMPLETING?
        ("REQUEUE+", RunState.PENDING),
        ("completed", RunState.COMPLETED),
        ("EXOTIC", None),
        ("EXOTIC+", None),
        ("", None),
        (" ", None),
        ("+", None),
    ],
)
def test_forms_of_a_word(word: str, state: RunState | None) -> None:
    assert run_state(word) is state


@given(st.text())
def test_no_word_is_an_error(word: str) -> None:
    assert run_state(word) is None or isinstance(run_state(word), RunState)
    report = report_of(Entry(job_id="1", word=word, submitted=0.0), 1.0)
    assert report.word == word


@pytest.mark.parametrize(
    ("word", "code", "status"),
    [
        ("COMPLETED", "0:0", 0),
        ("FAILED", "3:0", 3),
        ("FAILED", "0:9", 137),
        ("CANCELLED by 0", "0:0", None),
        ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", None),
        ("OUT_OF_MEMORY", "0:125", 137),
        ("FAILED", "0:53", None),  # the batch script was never started
        ("RUNNING", "0:0", None),
        ("FAILED", "", None),
        ("FAILED", "x:y", None),
        ("EXOTIC", "1:0", None),
    ],
)
def test_exit_statuses(word: str, code: str, status: int | None) -> None:
    assert exit_status(word, code) == status


def test_why_a_job_waits_is_shown_in_slurms_words_first() -> None:
    assert pending_reason("Resources") == "Resources"
    assert pending_reason("JobHeldUser").startswith("JobHeldUser: ")
    assert "scontrol release" in pending_reason("launch failed requeued held")


def test_squeue() -> None:
    text = (
        "CLUSTER: big\n"
        "12|RUNNING|2026-11-24T00:00:00|2026-11-24T00:01:00|2026-11-24T01:01:00|n[1-2,7]|None\n"
        "13|PENDING|2026-11-24T00:00:00|N/A|N/A||launch failed requeued held\n"
        "14|PENDING|2026-11-24T00:00:00|N/A|N/A||a reason | of the future\n"
        "slurm_load_jobs: something|else\n"
    )
    jobs = from_squeue(text)
    assert list(jobs) == ["12", "13", "14"]
    assert (jobs["12"].nodes, jobs["12"].reason) == ("n[1-2,7]", "")
    assert jobs["12"].started == jobs["12"].submitted + 60
    assert (jobs["13"].started, jobs["13"].reason) == (None, "launch failed requeued held")
    assert jobs["14"].reason == "a reason | of the future"


SCONTROL = """JobId=3 JobName=evil JobState=COMPLETED ExitCode=9:9 SubmitTime=2000-01-01T00:00:00
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901757 Nice=0 Account=(null) QOS=(null)
   JobState=PENDING Reason=launch failed requeued held Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:00 TimeLimit=UNLIMITED TimeMin=N/A
   SubmitTime=2026-11-24T00:13:13 EligibleTime=2026-11-24T00:15:14
   StartTime=2026-11-24T00:15:14 EndTime=Unknown Deadline=N/A
   NodeList=(null)
   Comment=JobState=FAILED Reason=x   JobState=FAILED Reason=x
"""


def test_scontrol_is_not_taken_in_by_names() -> None:
    entry = from_scontrol("3", SCONTROL)
    assert entry is not None
    assert (entry.word, entry.reason) == ("PENDING", "launch failed requeued held")
    assert (entry.restarts, entry.nodes, entry.exit_status) == (2, "", None)
    assert entry.submitted == slurm_records.seconds("2026-11-24T00:13:13")
    assert entry.ended is None
    assert from_scontrol("3", "slurm_load_jobs error: Invalid job id specified\n") is None
    assert from_scontrol("3", "") is None


def test_times_of_slurm_are_utc() -> None:
    assert slurm_records.seconds("1970-01-02T00:00:00") == 86_400.0
    for text in ("N/A", "Unknown", "NONE", "", "2026-13-01T00:00:00"):
        assert slurm_records.seconds(text) is None


def row(submitted: str, ended: str, word: str, job_id: str = "7") -> str:
    return f"{job_id}|2026-11-24T{submitted}|Unknown|2026-11-24T{ended}|{word}|0:0|n1\n"


def job(submitted: str) -> Job:
    found = slurm_records.seconds(f"2026-11-24T{submitted}")
    assert found is not None
    return Job(job_id="7", submitted=found)


def test_a_requeued_job_is_told_by_its_latest_attempt() -> None:
    """However late: the attempts hang together by the end of one and the submission of the next."""
    rows = row("01:00:00", "02:00:00", "PREEMPTED") + row("02:00:01", "03:00:00", "NODE_FAIL")
    rows += row("03:00:01", "04:00:00", "COMPLETED") + row("03:00:01", "04:00:00", "FAILED", job_id="8")
    found = latest_of(job("01:00:00"), from_sacct(rows))
    assert found is not None
    assert found.word == "COMPLETED"


def test_a_later_job_of_the_same_id_is_another() -> None:
    rows = row("01:00:00", "02:00:00", "FAILED") + row("02:00:01", "03:00:00", "COMPLETED")
    found = latest_of(job("01:00:00"), from_sacct(rows))
    assert found is not None
    assert found.word == "FAILED"
    found = latest_of(job("02:00:00"), from_sacct(rows))
    assert found is not None
    assert found.word == "COMPLETED"
    assert latest_of(job("05:00:00"), from_sacct(rows)) is None


def test_a_requeue_moves_the_submit_time_on_and_nothing_else_does() -> None:
    mine = job("01:00:00")
    later = Entry(job_id="7", word="RUNNING", submitted=mine.submitted + 3600)
    assert not is_same(mine, later)
    later.restarts = 1
    assert is_same(mine, later)
    assert not is_same(mine, Entry(job_id="7", word="RUNNING", submitted=mine.submitted - 3600, restarts=1))


def test_a_cancelled_job_does_not_say_why_it_once_waited() -> None:
    report = report_of(Entry(job_id="1", word="CANCELLED", submitted=0.0, reason="Priority"), 1.0)
    assert (report.state, report.reason) == (RunState.CANCELLED, "")


def test_a_start_that_is_only_expected_is_no_start() -> None:
    entry = Entry(job_id="1", word="PENDING", submitted=0.0, started=100.0, ended=200.0)
    assert (report_of(entry, 1.0).started, report_of(entry, 1.0).ended) == (None, None)
    entry.word = "RUNNING"
    assert (report_of(entry, 1.0).started, report_of(entry, 1.0).ended) == (100.0, None)


def test_the_environment_of_a_job_around_us_stays_there() -> None:
    own = {
        "PATH": "/bin",
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_CLUSTERS": "big",
        "SLURM_JOB_ID": "1",
        "SLURM_CPU_BIND": "x",
        "SLURM_TIME_FORMAT": "relative",
        "SBATCH_EXPORT": "NONE",
        "SQUEUE_FORMAT": "%i",
        "SRUN_CPUS_PER_TASK": "2",
        "SLURMFORK_RUN_ID": "outer",
        "SLURMFORK_NODE": "n1",
        "SLURMFORK_ROOT": "/runs",
        "TZ": "Asia/Tokyo",
    }
    kept = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "SLURMFORK_ROOT": "/runs"}
    assert environment_of_job([], own) == {**kept, "SLURM_CLUSTERS": "big", "TZ": "Asia/Tokyo"}
    assert environment(own) == {**kept, "TZ": "UTC0", "LC_ALL": "C"}


def test_what_a_worker_is_told_of_itself_is_not_for_the_run_that_it_submits() -> None:
    told = {"RANK": "3", "MASTER_ADDR": "n1", "TMPDIR": "/tmp/x", "NOTIFY_SOCKET": "/x", "CUDA_VISIBLE_DEVICES": "3"}
    own = {"PATH": "/bin", "HOME": "/root", **told}
    assert environment_of_job(["HOME"], own) == {"PATH": "/bin", **told}
    assert environment_of_job(["HOME"], {**own, "SLURMFORK_WORKER": "a/3"}) == {"PATH": "/bin"}


def test_sbatch_s_variables_are_told_to_be_ignored() -> None:
    own = {
        "SBATCH_PARTITION": "gpu",
        "SBATCH_TIMELIMIT": "60",
        "SBATCH_QOS": "x",
        "SBATCH_EXPORT": "NONE",
        "SBATCH_X": "",
    }
    assert ignored(make_spec(slurm={"qos": "y"}), own) == [
        "SBATCH_EXPORT is set and ignored: slurmfork decides what reaches the workers; use `env` and `secrets`",
        "SBATCH_PARTITION is set and ignored: put partition into slurm:",
        "SBATCH_TIMELIMIT is set and ignored: put time into slurm:",
    ]


def test_messages_are_one_line() -> None:
    assert one_line("a: b\n\n  c\n") == "a: b; c"
