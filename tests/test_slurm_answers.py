"""Answers that Slurm's commands of several releases gave, kept as they were printed: all are read to the same.

Each file has the same five jobs: one that is done, one that failed with 3, one that runs, one held under a name that
looks like another field, and one that was cancelled before it began. Host names and places were replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slurmfork.backends.base import Job
from slurmfork.backends.slurm import _PREFIX
from slurmfork.backends.slurm_records import Entry, from_scontrol, from_squeue
from slurmfork.backends.slurm_reports import is_same, report_of
from slurmfork.doctor import slurm
from slurmfork.doctor.site import Site, release_of, settings_of

FILES = sorted((Path(__file__).parent / "answers").glob("slurm-*.json"))
MEANT = {
    "ok": ("completed", "COMPLETED", "", 0),
    "bad": ("failed", "FAILED", "NonZeroExitCode", 3),
    "run": ("starting", "RUNNING", "", None),
    "held": ("pending", "PENDING", "JobHeldUser: it starts after `scontrol release`", None),
    "gone": ("cancelled", "CANCELLED", "", None),
}

pytestmark = pytest.mark.parametrize(
    "answers", [json.loads(path.read_text()) for path in FILES], ids=lambda a: a["version"].split()[-1]
)


def told(entry: Entry | None) -> tuple[str, str, str, int | None]:
    assert entry is not None
    report = report_of(entry, 1.0)
    return str(report.state), report.word, report.reason, report.exit_status


@pytest.mark.parametrize("name", MEANT)
def test_scontrol(answers: dict[str, Any], name: str) -> None:
    entry = from_scontrol(answers["ids"][name], answers["scontrol"][name])
    assert told(entry) == MEANT[name]
    assert entry is not None
    assert bool(entry.nodes) == (name not in ("held", "gone"))
    assert entry.submitted is not None
    assert is_same(Job(job_id=entry.job_id, submitted=entry.submitted + 2), entry)


@pytest.mark.parametrize("name", MEANT)
def test_squeue_says_the_same_but_for_exit_statuses(answers: dict[str, Any], name: str) -> None:
    job_id = answers["ids"][name]
    listed = from_squeue(answers["squeue"])[job_id]
    shown = from_scontrol(job_id, answers["scontrol"][name])
    assert told(listed)[:3] == MEANT[name][:3]
    assert shown is not None
    assert (listed.submitted, listed.nodes) == (shown.submitted, shown.nodes)
    report, other = report_of(listed, 1.0), report_of(shown, 1.0)
    assert (report.started, report.ended) == (other.started, other.ended)


def test_refusals(answers: dict[str, Any]) -> None:
    assert "Invalid job id" in answers["unknown"]
    assert "accounting storage is disabled" in answers["sacct"]
    assert _PREFIX.sub("", answers["refused"].splitlines()[0]) == "invalid partition specified: nowhere"


def test_doctor_reads_the_configuration(answers: dict[str, Any]) -> None:
    site = Site(settings_of(answers["config"]), client=answers["version"].strip(), environment={})
    assert site.release == release_of(answers["version"]) > (20, 0)
    found = {one.name: one for check in slurm.CHECKS if (one := check(site)) is not None}
    assert found["process tracking"].detail == "proctrack/linuxproc"
    assert found["grace"].detail == "KillWait is 5 s"
    assert found["slurm"].ok
    assert ("rate limit" in found) == ("rl_enable" in answers["config"])
    assert ("private data" in found) == ("PrivateData             = none" not in answers["config"])
    assert not {"private /tmp", "gpus", "mpi", "ports"} & set(found)
