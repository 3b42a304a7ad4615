"""The sweep, on real leftovers and real decoys: all of the run goes, and nothing else is touched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from processes import PATIENCE, Yard, argv, wait_until

from slurmfork import names, process, sweep
from slurmfork.errors import RunDirError
from slurmfork.journal import MAX_LINE, Ended, Intent, Journal, Record, Seen, Started
from slurmfork.process import Identity
from slurmfork.rundir import RunDir, RunRecord
from slurmfork.scratch import Scratch, remove

NOBODY = 65534
SCRIPT = Path(sweep.__file__)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


@pytest.fixture
def rundir(yard: Yard, tmp_path: Path) -> RunDir:
    rundir = RunDir(tmp_path / "runs" / yard.run_id)
    rundir.make()
    return rundir


def run(rundir: RunDir, *, node: str | None = None, grace: float = 0.1, spare: int = 0) -> sweep.SweepReport:
    return sweep.sweep(
        rundir.path, run_id=rundir.run_id, node=node, grace=grace, spare=frozenset([spare] if spare else [])
    )


def write(rundir: RunDir, *records: Record, node: str = "n1") -> Path:
    path = rundir.journal(node)
    book = Journal(path)
    book.append(*records)
    book.close()
    return path


def started(one: Identity) -> Started:
    pid, start_time, boot_id = one
    return Started(
        start_id="s1",
        worker="a/0",
        pid=pid,
        start_time=start_time,
        boot_id=boot_id,
        uid=os.geteuid(),
        argv=["x"],
    )


def seen(one: Identity) -> Seen:
    return Seen(worker="a/0", processes=[(one.pid, one.start_time)])


def ended(one: Identity) -> Ended:
    return Ended(start_id="s1", worker="a/0", pid=one.pid, exit_status=0)


# --- by the tag --------------------------------------------------------------------------------------------


def test_all_of_the_run_goes_and_nothing_else(yard: Yard, rundir: RunDir) -> None:
    yard.innocent("head", **{names.RUN_ID: yard.run_id})
    yard.innocent("another-run", **{names.RUN_ID: yard.run_id + "0", names.NODE: yard.node})
    yard.innocent("untagged")
    kinds = ["plain", "ignores-term", "daemon", "stopped", "forks", "breeds", "hops", "headless"]
    for kind in kinds:
        yard.start(kind)
    yard.await_all(kinds)
    report = run(rundir)
    assert yard.living() == []
    assert report.survivors == []
    assert len(report.killed) > len(kinds) + 50
    yard.assert_innocents_live()


def test_nothing_left_is_nothing_done(rundir: RunDir) -> None:
    assert run(rundir) == sweep.SweepReport()


def test_one_node_alone(yard: Yard, rundir: RunDir) -> None:
    here = yard.start("plain")
    there = yard.start("plain", "there", env={**yard.tag, names.NODE: "n10"})
    run(rundir, node="n1")
    assert not process.alive(here)
    assert process.alive(there)
    run(rundir)
    assert not process.alive(there)


def test_there_is_time_to_leave_in_order(yard: Yard, rundir: RunDir) -> None:
    yard.start("graceful")
    begun = time.monotonic()
    report = run(rundir, grace=PATIENCE)
    assert (yard.directory / "graceful.bye").exists()
    assert time.monotonic() - begun < PATIENCE
    assert len(report.killed) == 1


def test_what_is_spared_lives(yard: Yard, rundir: RunDir) -> None:
    one = yard.start("plain")
    assert run(rundir, spare=one.pid) == sweep.SweepReport()
    assert process.alive(one)
    run(rundir)


def test_the_job_that_a_worker_submitted_lives(yard: Yard, rundir: RunDir) -> None:
    record = RunRecord(run_id=yard.run_id, name="x", backend="slurm", submitted=0.0, cwd="/", user="u", job_id="7")
    rundir.write_record(rundir.record, record)
    yard.innocent("submitted", **yard.tag, SLURM_JOB_ID="8")
    yard.start("plain", env={**yard.tag, "SLURM_JOB_ID": "7"})
    assert len(run(rundir).killed) == 1
    yard.assert_innocents_live()


def test_a_daemon_without_a_tag_goes_with_its_parent(yard: Yard, rundir: RunDir) -> None:
    """It falls to the subreaper above it, a guardian say, which has a tag."""
    code = (
        "import ctypes, os, signal, subprocess, sys\n"
        "ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)\n"
        "subprocess.Popen(sys.argv[1:])\n"
        "signal.pause()\n"
    )
    yard.run([sys.executable, "-c", code, *argv("scrubbed", yard.directory, "scrubbed")])
    one = yard.await_one("scrubbed")
    assert one not in process.tagged(yard.run_id)
    assert len(run(rundir).killed) >= 2
    assert not process.alive(one)


def test_what_its_parent_took_out_of_sight_is_still_ended(yard: Yard, rundir: RunDir) -> None:
    """The parent ends at SIGTERM; its child does not, has no tag, and is then anybody's orphan."""
    command = argv("ignores-term", yard.directory, "ignores-term")
    yard.run(["sh", "-c", 'env -i "$@" & wait', "sh", *command])
    one = yard.await_one("ignores-term")
    report = run(rundir)
    assert not process.alive(one)
    assert report.survivors == []


# --- by the log --------------------------------------------------------------------------------------------


WRITER = "import os, signal, sys; os.open(sys.argv[1], int(sys.argv[2]), 0o600); signal.pause()"


def with_file(yard: Yard, path: Path, flags: int) -> Identity:
    """A process in a session of its own that has nothing of the run but this file."""
    path.touch()
    child = yard.run([sys.executable, "-c", WRITER, os.fspath(path), str(flags)], env={})
    wait_until(lambda: any(file.path == str(path) for file in process.open_files(child.pid)), "the file to be open")
    one = process.identify(child.pid)
    assert one is not None
    return one


def test_what_shed_its_tag_is_known_by_the_log_that_it_writes(yard: Yard, rundir: RunDir) -> None:
    log = rundir.worker_log("a", 0)
    writer = with_file(yard, log, os.O_WRONLY | os.O_APPEND)
    bystanders = [
        with_file(yard, log, os.O_RDONLY),
        with_file(yard, rundir.logs / ".a-0.log.swp", os.O_RDWR),  # an editor's
        with_file(yard, rundir.path / "notes.log", os.O_WRONLY),
        with_file(yard, yard.directory / "a-0.log", os.O_WRONLY),
    ]
    report = run(rundir)
    assert len(report.killed) == 1
    assert not process.alive(writer)
    assert all(map(process.alive, bystanders))
    yard.kill(*bystanders)


def test_a_log_tells_of_which_node_its_writer_is(yard: Yard, rundir: RunDir) -> None:
    write(rundir, Intent(start_id="s1", worker="a/0", argv=["x"]), node="n1")
    write(rundir, Intent(start_id="s1", worker="a/1", argv=["x"]), node="n2")
    here = with_file(yard, rundir.worker_log("a", 0), os.O_WRONLY)
    there = with_file(yard, rundir.worker_log("a", 1), os.O_WRONLY)
    run(rundir, node="n1")
    assert not process.alive(here)
    assert process.alive(there)
    run(rundir, node="n2")
    assert not process.alive(there)


def test_a_log_of_a_run_directory_that_was_removed_is_still_known(yard: Yard, rundir: RunDir) -> None:
    writer = with_file(yard, rundir.worker_log("a", 0), os.O_WRONLY)
    shutil.rmtree(rundir.path)
    assert len(run(rundir).killed) == 1
    assert not process.alive(writer)


def test_logs_of_a_directory_that_only_is_called_like_the_run_are_not_its_own(
    yard: Yard, rundir: RunDir, tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    (other / "logs").mkdir(parents=True)
    (other / "journal").mkdir()
    for path in (other, other / "journal", other / "logs"):
        path.chmod(0o700)
    bystander = with_file(yard, other / "logs" / "a-0.log", os.O_WRONLY)
    shutil.rmtree(rundir.path)
    rundir.path.symlink_to(other)
    with pytest.raises(RunDirError):
        run(rundir)
    assert process.alive(bystander)
    yard.kill(bystander)


# --- by the journal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [started, seen])
def test_what_shed_the_tag_is_found_in_the_journal(yard: Yard, rundir: RunDir, record: object) -> None:
    one = yard.start("scrubbed")
    assert callable(record)
    assert run(rundir).killed == []
    assert process.alive(one)
    write(rundir, record(one))
    assert len(run(rundir).killed) == 1
    assert yard.living() == []


def test_what_was_seen_outlives_the_end_of_its_worker(yard: Yard, rundir: RunDir) -> None:
    worker, one = yard.start("plain"), yard.start("scrubbed")
    write(rundir, started(worker), seen(one), ended(worker))
    yard.kill(worker)
    assert len(run(rundir).killed) == 1
    assert not process.alive(one)


def test_what_the_journal_calls_ended_is_left_alone(yard: Yard, rundir: RunDir) -> None:
    one = yard.innocent("whoever")
    write(rundir, started(one), ended(one))
    assert run(rundir).killed == []
    yard.assert_innocents_live()


def test_a_reused_pid_is_not_hit(yard: Yard, rundir: RunDir) -> None:
    one = yard.innocent("decoy")
    earlier = one._replace(start_time=one.start_time - 1)
    write(rundir, started(earlier), seen(earlier), started(one._replace(boot_id="of-another-boot")))
    assert run(rundir).killed == []
    yard.assert_innocents_live()
    write(rundir, seen(one))
    assert len(run(rundir).killed) == 1, "the decoy was out of reach, so the test above proves nothing"


def test_a_torn_journal_serves(yard: Yard, rundir: RunDir) -> None:
    one = yard.start("scrubbed")
    path = write(rundir, seen(one))
    with path.open("ab") as file:
        file.write(b"x" * MAX_LINE * 2 + b'\n{"op":"seen","wor')
    report = run(rundir)
    assert report.notes == ["journal n1.jsonl has 2 damaged lines"]
    assert len(report.killed) == 1


# --- what only pretends to be the run's --------------------------------------------------------------------


def plant_link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def plant_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def plant_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def plant_shared(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("node", [None, "n1"])
@pytest.mark.parametrize("plant", [plant_link, plant_pipe, plant_directory, plant_shared])
def test_a_planted_journal_is_not_believed(yard: Yard, rundir: RunDir, plant: object, node: str | None) -> None:
    one = yard.innocent("decoy")
    path = write(rundir, seen(one))
    assert callable(plant)
    plant(path)
    report = run(rundir, node=node)
    assert report.killed == []
    assert len(report.notes) == 1
    assert report.notes[0].startswith("journal n1.jsonl was not used")
    yard.assert_innocents_live()


@needs_root
def test_the_journal_of_another_user_is_not_believed(yard: Yard, rundir: RunDir) -> None:
    path = write(rundir, seen(yard.innocent("decoy")))
    os.chown(path, NOBODY, -1)
    assert run(rundir).notes == ["journal n1.jsonl was not used: the journal belongs to another user"]
    yard.assert_innocents_live()


@needs_root
def test_a_process_of_another_user_is_not_touched(yard: Yard, rundir: RunDir) -> None:
    """Neither by its tag nor by a record, though root could."""
    child = yard.run(["sleep", "60"], user=NOBODY)
    one = process.identify(child.pid)
    assert one is not None
    write(rundir, started(one), seen(one))
    assert run(rundir) == sweep.SweepReport()
    assert process.alive(one)
    child.kill()
    child.wait()


@pytest.mark.parametrize("which", ["path", "journals"])
def test_a_directory_that_others_can_write_is_not_believed(yard: Yard, rundir: RunDir, which: str) -> None:
    write(rundir, seen(yard.innocent("decoy")))
    getattr(rundir, which).chmod(0o777)
    with pytest.raises(RunDirError, match="not believed"):
        run(rundir)
    yard.assert_innocents_live()


@needs_root
def test_the_directory_of_another_user_is_not_believed(yard: Yard, rundir: RunDir) -> None:
    write(rundir, seen(yard.innocent("decoy")))
    os.chown(rundir.path, NOBODY, -1)
    with pytest.raises(RunDirError, match="not believed"):
        run(rundir)
    yard.assert_innocents_live()


# --- as a program ------------------------------------------------------------------------------------------


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60, cwd="/"
    )


def test_the_program_prints_a_report(yard: Yard, rundir: RunDir) -> None:
    one = yard.start("plain")
    done = call("--run-dir", str(rundir.path), "--node", "n1", "--grace", "0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (len(report["killed"]), report["survivors"], report["notes"]) == (1, [], [])
    assert (report["node"], report["boot_id"]) == ("n1", process.boot_id())
    assert f"pid {one.pid} (" in done.stdout
    assert not process.alive(one)


def test_callers_are_spared(yard: Yard, rundir: RunDir) -> None:
    """The exit trap of a batch shell: the shell carries the tag of the run that it sweeps."""
    one = yard.start("plain")
    out = yard.directory / "report"
    trap = 'trap \'"$@" > "$out"; echo "status $?" >> "$out"\' EXIT; true'
    command = [sys.executable, "-I", str(SCRIPT), "--run-dir", str(rundir.path), "--grace", "0.1"]
    shell = yard.run(["bash", "-c", trap, "bash", *command], env={**yard.tag, "out": str(out)})
    assert shell.wait(PATIENCE) == 0
    assert "status 0" in out.read_text()
    assert f"pid {one.pid} (" in out.read_text()
    assert not process.alive(one)


def test_survivors_are_the_exit_status(yard: Yard, rundir: RunDir) -> None:
    yard.start("ignores-term")
    report = sweep.sweep(rundir.path, run_id=yard.run_id, node=None, grace=0, bound=0)
    assert len(report.survivors) == 1
    assert report.killed == []
    assert msgspec.json.decode(msgspec.json.encode(report))["survivors"] == report.survivors
    run(rundir)


def test_without_a_run_directory_the_tag_is_enough(yard: Yard, tmp_path: Path) -> None:
    one = yard.start("plain")
    done = call("--run-dir", str(tmp_path / "gone" / yard.run_id))
    assert done.returncode == 0
    assert "No such file" in json.loads(done.stdout)["notes"][0]
    assert not process.alive(one)


@pytest.mark.parametrize(
    "arguments",
    [["--run-dir", "/a b"], ["--node", "../../etc"], ["--grace", "-1"], ["--grace", "nan"]],
    ids=str,
)
def test_nonsense_is_refused_in_one_line(arguments: list[str]) -> None:
    done = call("--run-dir", "/run-id", *arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_directory_of_no_run_is_refused_in_one_line(yard: Yard, rundir: RunDir) -> None:
    rundir.path.chmod(0o777)
    done = call("--run-dir", str(rundir.path))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_by_job_it_finds_the_runs_of_this_host(yard: Yard, tmp_path: Path) -> None:
    """As an epilog has it: nothing is known but the job."""
    job = str(uuid.uuid4().int)  # no other test's
    place = Scratch(yard.run_id, yard.node)
    place.mark(("here", job), tmp_path / yard.run_id, yard.node)
    RunDir(tmp_path / yard.run_id).make()
    yard.start("plain")
    assert call("--job", "here", job + "0").stdout == ""
    assert call("--job", "there", job).stdout == "", "a job of that id of another cluster"
    assert len(yard.living()) == 1
    done = call("--job", "here", job, "--grace", "0.1")
    assert (done.returncode, len(json.loads(done.stdout)["killed"])) == (0, 1), done.stderr
    assert yard.living() == []
    remove(place.path)  # this process held it, as an agent does
