"""The Slurm backend and its batch script on a real Slurm: what is submitted, told, shared and cancelled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Factory, MiniCluster
from processes import wait_until
from rendering import HOSTILE, Stage, make_spec, script_of

from slurmfork.backends.base import Job, JobReport
from slurmfork.backends.queue import Queue
from slurmfork.backends.slurm import SlurmBackend
from slurmfork.errors import BackendError, Unanswered
from slurmfork.names import RunState
from slurmfork.plan import Request
from slurmfork.rundir import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

REQUEST = Request(nodes=1, gpus_per_node=0, cpus_per_node=1)
SPEC = make_spec()


class Site:
    """A user at a cluster: submits scripts of a few lines, asks about them. ``end`` cancels what is left."""

    def __init__(self, home: Path, cluster: MiniCluster) -> None:
        self.home = home
        self.cluster = cluster
        self.cache = home / "cache"
        self.cache.mkdir(mode=0o700)
        self.backend = SlurmBackend(directory=self.cache)
        self.jobs: list[Job] = []

    def rundir(self, name: str, lines: str = "true") -> RunDir:
        made = RunDir(self.home / name)
        made.path.mkdir(mode=0o700)
        made.script.write_text(f"#!/bin/bash\n#SBATCH --output={made.path}/batch.log\n{lines}\n")
        return made

    def submit(self, lines: str) -> tuple[RunDir, Job]:
        rundir = self.rundir(f"run-{len(self.jobs)}", lines)
        job = self.backend.submit(rundir, SPEC, REQUEST)
        self.jobs.append(job)
        return rundir, job

    def report(self, asked: tuple[RunDir, Job], backend: SlurmBackend | None = None) -> JobReport:
        return (backend or self.backend).report([asked])[0]

    def fresh(self, asked: tuple[RunDir, Job]) -> JobReport:
        """As Slurm says now: with no answer shared from before."""
        for file in self.cache.glob("squeue-*.json"):
            file.unlink()
        return self.report(asked)

    def scontrol(self, job: Job) -> str:
        return self.cluster.run(["scontrol", "show", "job", job.job_id]).stdout

    def await_state(self, asked: tuple[RunDir, Job], *states: RunState) -> JobReport:
        wait_until(lambda: self.fresh(asked).state in states, f"job {asked[1].job_id} to be {states}")
        return self.report(asked)

    def end(self) -> None:
        ids = [job.job_id for job in self.jobs]
        if ids:
            self.cluster.run(["scancel", "-Q", *ids], check=False)
        for asked in ids:
            shown = ["squeue", "-h", "-t", "PD,R,CG,CF,S", "-j", asked, "-o", "%T"]
            wait_until(lambda argv=shown: not self.cluster.run(argv, check=False).stdout.strip(), "the end")


@pytest.fixture
def site(tmp_path: Path, minicluster: Factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site_of(tmp_path, minicluster(nodes=2, gpus=4), monkeypatch)


def site_of(home: Path, cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    made = Site(home, cluster)
    yield made
    made.end()


def on_path(directory: Path, name: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a program before the real one of that name; ``$REAL`` is the real one."""
    real = subprocess.run(["which", name], capture_output=True, text=True, check=True).stdout.strip()
    directory.mkdir(exist_ok=True)
    wrapper = directory / name
    wrapper.write_text(f"#!/bin/bash\nREAL={real}\n{lines}\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return wrapper


# --- submitting


def test_submit_knows_the_job_by_slurms_own_clock(site: Site) -> None:
    _, job = site.submit("true")
    shown = site.cluster.run(["squeue", "-h", "-t", "all", "-j", job.job_id, "-o", "%V"]).stdout.strip()
    assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(job.submitted)) == shown
    assert (job.cluster, job.notes) == (None, [])


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/St_Johns"])
def test_a_time_zone_changes_nothing(site: Site, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    asked = site.submit("sleep 100")
    assert abs(asked[1].submitted - time.time()) < 100
    assert site.fresh(asked).state is not None


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "long"])
def test_values_come_out_of_sbatch_as_they_went_in(site: Site, kind: str) -> None:
    text = HOSTILE[kind].replace("CANARY", str(site.home / "canary"))
    rundir = site.rundir("hostile")
    spec = make_spec(slurm={"comment": text, "job-name": text, "hold": True})
    rundir.script.write_text(script_of(spec, rundir.path, request=REQUEST))
    job = site.backend.submit(rundir, spec, REQUEST)
    site.jobs.append(job)
    shown = site.scontrol(job)
    assert f"\n   Comment={text} \n" in shown or f"\n   Comment={text}\n" in shown
    assert shown.splitlines()[0] == f"JobId={job.job_id} JobName={text}"
    assert not (site.home / "canary").exists()


def test_long_values_come_out_whole_or_are_refused_by_slurm(site: Site) -> None:
    rundir = site.rundir("long")
    spec = make_spec(slurm={"comment": "x " * 500, "hold": True})
    rundir.script.write_text(script_of(spec, rundir.path, request=REQUEST))
    job = site.backend.submit(rundir, spec, REQUEST)
    site.jobs.append(job)
    assert f"Comment={'x ' * 500}" in site.scontrol(job)
    spec = make_spec(slurm={"comment": "x " * 2000})
    rundir.script.write_text(script_of(spec, rundir.path, request=REQUEST))
    with pytest.raises(BackendError, match="an option is longer than Slurm takes"):
        site.backend.submit(rundir, spec, REQUEST)


def test_a_partition_that_is_not_there(site: Site) -> None:
    rundir = site.rundir("nowhere", "#SBATCH --partition=nowhere")
    with pytest.raises(BackendError, match=r"^sbatch: invalid partition specified: nowhere.*there are: gpu"):
        site.backend.submit(rundir, SPEC, REQUEST)


def test_more_than_there_is(site: Site) -> None:
    rundir = site.rundir("greedy", "#SBATCH --gpus-per-node=99")
    with pytest.raises(BackendError, match="not available; asked for were 3 nodes with 99 GPUs") as caught:
        site.backend.submit(rundir, SPEC, Request(nodes=3, gpus_per_node=99, cpus_per_node=1))
    assert "\n" not in str(caught.value)


def test_what_a_site_prints_around_the_job_id(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = 'echo 17; echo "sbatch: lua: your quota is low" >&2; "$REAL" "$@" || exit; echo "have a nice day"'
    on_path(site.home / "bin", "sbatch", lines, monkeypatch)
    _, job = site.submit("sleep 100")
    assert job.notes == ["sbatch: lua: your quota is low"]
    assert f"JobId={job.job_id} " in site.scontrol(job)


def test_a_submit_that_is_interrupted_may_have_submitted(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(site.home / "bin", "sbatch", f"touch {site.home}/asked; exec sleep 60", monkeypatch)

    def interrupt() -> None:
        wait_until((site.home / "asked").exists, "sbatch")
        os.kill(os.getpid(), signal.SIGINT)

    asking = threading.Thread(target=interrupt)
    asking.start()
    with pytest.raises(Unanswered, match="sbatch was interrupted; Slurm may have taken the job all the same"):
        site.backend.submit(site.rundir("slow"), SPEC, REQUEST)
    asking.join()


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    backend = SlurmBackend(directory=tmp_path)
    with pytest.raises(BackendError, match=r"sbatch was not found on PATH: .*--backend local"):
        backend.submit(RunDir(tmp_path), SPEC, REQUEST)
    report = backend.report([(RunDir(tmp_path), Job(job_id="1", submitted=1.0))])[0]
    assert (report.state, report.reason) == (None, "squeue was not found on PATH")
    assert [check.ok for check in backend.check()] == [False]
    with pytest.raises(BackendError, match="scancel was not found"):
        backend.cancel(RunDir(tmp_path), Job(job_id="1", submitted=1.0))


def test_doctor(site: Site) -> None:
    found = {check.name: check for check in site.backend.check()}
    assert all(check.ok for check in found.values())
    assert found["process tracking"].detail == "proctrack/linuxproc"
    assert found["grace"].detail == "KillWait is 5 s"
    assert "disabled" in found["accounting"].detail
    assert "gpu*: 2 nodes, up" in found["partitions"].detail
    assert "mode CANCEL" in found["preemption"].detail


# --- what is told


def test_pending_for_lack_of_resources(site: Site) -> None:
    site.submit("#SBATCH --nodes=2 --exclusive\nsleep 100")
    waiting = site.submit("#SBATCH --nodes=2 --exclusive\nsleep 100")
    wait_until(lambda: site.fresh(waiting).reason in ("Resources", "Priority"), "a reason")
    report = site.report(waiting)
    assert (report.state, report.word, report.exit_status) == (RunState.PENDING, "PENDING", None)
    assert (report.started, report.ended) == (None, None)


def test_a_held_job_says_that_it_will_not_start(site: Site) -> None:
    held = site.submit("#SBATCH --hold\ntrue")
    assert site.fresh(held).reason == "JobHeldUser: it starts after `scontrol release`"


def test_running_and_cancelled_from_outside(site: Site) -> None:
    asked = site.submit("sleep 100")
    report = site.await_state(asked, RunState.STARTING)
    assert report.word == "RUNNING"
    assert report.nodes in site.cluster.nodes
    assert report.started is not None
    assert not site.backend.ended(*asked)
    site.cluster.run(["scancel", asked[1].job_id])
    report = site.await_state(asked, RunState.CANCELLED)
    assert report.exit_status in (None, 143)
    assert report.ended is not None


@pytest.mark.parametrize(("status", "state"), [(0, RunState.COMPLETED), (3, RunState.FAILED)])
def test_the_batch_scripts_exit_status(site: Site, status: int, state: RunState) -> None:
    asked = site.submit(f"exit {status}")
    report = site.await_state(asked, RunState.COMPLETED, RunState.FAILED)
    assert (report.state, report.exit_status) == (state, status)


def test_many_jobs_are_told_by_one_squeue(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [site.submit("#SBATCH --hold\ntrue") for _ in range(5)]
    count = counting(site, "squeue", monkeypatch)
    reports = site.backend.report(asked)
    assert {report.state for report in reports} == {RunState.PENDING}
    assert len(reports) == 5
    assert count() == 1


def test_a_requeued_job_is_told_by_its_new_attempt(site: Site) -> None:
    asked = site.submit("#SBATCH --requeue\nsleep 100")
    site.await_state(asked, RunState.STARTING)
    site.cluster.run(["scontrol", "requeue", asked[1].job_id])
    assert site.await_state(asked, RunState.PENDING).reason == "BeginTime"
    early = (asked[0], Job(job_id=asked[1].job_id, submitted=asked[1].submitted - 3600))
    assert site.fresh(early).state is RunState.PENDING  # the submit time moved, but by a requeue


# --- another job of the same id


def test_another_job_of_that_id_is_not_ours(site: Site) -> None:
    rundir, job = site.submit("sleep 100")
    ours = Job(job_id=job.job_id, submitted=job.submitted - 3600)
    report = site.fresh((rundir, ours))
    assert (report.state, report.word) == (None, "")
    assert "another job" in report.reason
    site.backend.cancel(rundir, ours)
    assert site.backend.ended(rundir, ours)
    assert site.fresh((rundir, job)).state in (RunState.PENDING, RunState.STARTING)


def test_cancel(site: Site) -> None:
    asked = site.submit("sleep 100")
    site.backend.cancel(*asked)
    wait_until(lambda: site.backend.ended(*asked), "the end")
    assert site.report(asked).state is RunState.CANCELLED  # what `ended` saw is final, and shared
    site.backend.cancel(*asked)
    site.backend.cancel(asked[0], Job(job_id="4000000", submitted=time.time()))


# --- the shared answer


def counting(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count how often a program is called from here on; it is the real one that answers."""
    log = site.home / f"{name}.calls"
    on_path(site.home / "bin", name, f'echo "$@" >>{log}; exec "$REAL" "$@"', monkeypatch)
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


ASK = """
import sys
from pathlib import Path
from slurmfork.backends.base import Job
from slurmfork.backends.slurm import SlurmBackend
from slurmfork.rundir import RunDir
sys.stdin.readline()
job = Job(job_id=sys.argv[2], submitted=float(sys.argv[3]))
print(SlurmBackend(directory=Path(sys.argv[1])).report([(RunDir(Path("/x")), job)])[0].word)
"""


def test_fifty_processes_ask_squeue_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    _, job = site.submit("#SBATCH --hold\ntrue")
    count = counting(site, "squeue", monkeypatch)
    argv = [sys.executable, "-c", ASK, str(site.cache), job.job_id, str(job.submitted)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    askers = [subprocess.Popen(argv, text=True, **pipes) for _ in range(50)]
    begun = time.monotonic()
    for asker in askers:
        asker.stdin.write("\n")
        asker.stdin.flush()
    answers = [asker.communicate(timeout=200) for asker in askers]
    took = time.monotonic() - begun
    assert [answer[0] for answer in answers] == ["PENDING\n"] * 50, [answer[1] for answer in answers][:3]
    assert 1 <= count() <= 1 + took // 10


def test_a_new_job_is_not_known_before_the_next_asking_is_due(site: Site) -> None:
    old = site.submit("#SBATCH --hold\ntrue")
    assert site.fresh(old).state is RunState.PENDING
    time.sleep(1.1)  # Slurm's clock has seconds only
    new = site.submit("#SBATCH --hold\ntrue")
    report = site.report(new)
    assert (report.state, report.word) == (None, "")
    assert report.reason.startswith("submitted ")
    due = SlurmBackend(directory=site.cache)
    wait_until(lambda: site.report(new, due).state is RunState.PENDING, "the next asking")


def test_a_failing_squeue_leaves_the_last_answer_and_its_age(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = site.submit("#SBATCH --hold\ntrue")
    before = Queue(None, directory=site.cache, interval=0).report([asked[1]])[0]
    lines = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'
    on_path(site.home / "bin", "squeue", lines, monkeypatch)
    after = Queue(None, directory=site.cache, interval=0).report([asked[1]])[0]
    assert (after.state, after.fresh) == (RunState.PENDING, before.fresh)
    unseen = Job(job_id="4000000", submitted=time.time() - 100)
    report = Queue(None, directory=site.cache, interval=0).report([unseen])[0]
    assert (report.state, report.word) == (None, "")
    assert "Unable to contact slurm controller" in report.reason


def test_an_empty_answer_is_not_the_end(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = site.submit("#SBATCH --hold\ntrue")
    on_path(site.home / "bin", "squeue", "exit 0", monkeypatch)
    report = Queue(None, directory=site.cache, interval=0).report([asked[1]])[0]
    assert report.state in (None, RunState.PENDING)
    early = Job(job_id=asked[1].job_id, submitted=asked[1].submitted - 60)
    assert Queue(None, directory=site.cache, interval=0).report([early])[0].state is RunState.PENDING


def test_a_damaged_or_planted_answer_is_not_read(site: Site) -> None:
    asked = site.submit("#SBATCH --hold\ntrue")
    assert site.fresh(asked).state is RunState.PENDING
    (file,) = site.cache.glob("squeue-*.json")
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_bytes(b"{damaged")
    assert site.report(asked).state is RunState.PENDING
    planted = site.home / "planted"
    planted.write_bytes(file.read_bytes().replace(b'"PENDING"', b'"RUNNING"'))
    file.unlink()
    file.symlink_to(planted)
    assert site.report(asked).word == "PENDING"
    if os.geteuid() == 0:
        planted.rename(file)
        os.chown(file, 12345, 12345)
        assert site.report(asked).word == "PENDING"


# --- jobs that squeue has dropped


@pytest.fixture(params=["accounting", "no accounting"])
def forgetful(
    request: pytest.FixtureRequest, tmp_path: Path, minicluster: Factory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A Slurm that forgets a job two seconds after its end, with and without accounting."""
    cluster = minicluster(nodes=1, gpus=0, min_job_age=2, accounting=request.param == "accounting")
    yield from site_of(tmp_path, cluster, monkeypatch)


def forgotten(site: Site, job: Job) -> bool:
    done = site.cluster.run(["scontrol", "show", "job", job.job_id], check=False)
    return "Invalid job id" in done.stderr


def test_a_job_that_squeue_dropped_before_it_was_seen(
    forgetful: Site, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = forgetful.submit("exit 3")
    wait_until(lambda: forgotten(forgetful, asked[1]), "Slurm to forget the job", 120)
    accounted = "no accounting" not in request.node.name
    count = counting(forgetful, "sacct", monkeypatch)
    if accounted:
        wait_until(lambda: forgetful.fresh(asked).state is not None, "accounting")
        report = forgetful.report(asked)
        assert (report.state, report.exit_status, report.word) == (RunState.FAILED, 3, "FAILED")
        assert report.ended is not None
    else:
        report = forgetful.fresh(asked)
        assert (report.state, report.word, report.exit_status) == (None, "", None)
        assert "Slurm accounting storage is disabled" in report.reason
    before = count()
    queue = Queue(None, directory=forgetful.cache, interval=0)
    assert queue.report([asked[1]])[0].state == report.state
    assert count() == before  # final, or unknown and not to be asked again so soon
    assert forgetful.backend.ended(*asked)
    forgetful.backend.cancel(*asked)


def test_what_was_seen_at_the_end_is_kept_for_good(forgetful: Site) -> None:
    asked = forgetful.submit("exit 3")
    seen = forgetful.await_state(asked, RunState.FAILED)
    assert seen.exit_status == 3
    wait_until(lambda: forgotten(forgetful, asked[1]), "Slurm to forget the job", 120)
    queue = Queue(None, directory=forgetful.cache, interval=0)
    assert queue.report([asked[1]])[0] == seen


@pytest.fixture
def accounted(tmp_path: Path, minicluster: Factory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    cluster = minicluster(nodes=1, gpus=0, min_job_age=2, accounting=True)
    yield from site_of(tmp_path, cluster, monkeypatch)


def test_a_cluster_of_its_own_name(accounted: Site) -> None:
    """With accounting, `-M` works: sbatch then prints ID;CLUSTER, and all that follows asks there."""
    config = accounted.cluster.run(["scontrol", "show", "config"]).stdout.splitlines()
    name = next(line.partition("=")[2].strip() for line in config if line.startswith("ClusterName"))
    asked = accounted.submit(f"#SBATCH --clusters={name}\nsleep 100")
    assert asked[1].cluster == name
    accounted.await_state(asked, RunState.STARTING)
    accounted.backend.cancel(*asked)
    wait_until(lambda: accounted.backend.ended(*asked), "the end")
    assert accounted.report(asked).state is RunState.CANCELLED


# --- the batch script, on real nodes

HEAD = """
import os, subprocess, sys
run_dir = os.environ["SLURMFORK_RUN_DIR"]
status = subprocess.call(sys.argv[sys.argv.index("--") + 1 :])
if not os.path.exists(os.path.join(run_dir, "no-end")):
    open(os.path.join(run_dir, "end.json"), "w").close()
sys.exit(status)
"""
AGENT = """
import json, os, sys
names = "SLURMD_NODENAME CUDA_VISIBLE_DEVICES SLURMFORK_RUN_ID SLURM_JOB_ID SLURMFORK_KILL_WAIT".split()
seen = {name: os.environ.get(name) for name in names}
print(json.dumps({**seen, "cpus": len(os.sched_getaffinity(0)), "file": os.readlink("/proc/self/fd/1")}))
sys.exit(int(os.environ.get("AGENT_STATUS", "0")))
"""


def staged(site: Site, name: str = "stage", **given: object) -> tuple[Stage, RunDir, Job]:
    stage = Stage(site.home, name)
    (stage.package / "head" / "__main__.py").write_text(HEAD)
    (stage.package / "agent").mkdir()
    (stage.package / "agent" / "__main__.py").write_text(AGENT)
    (stage.run_dir / "agents").mkdir()
    request = Request(nodes=2, gpus_per_node=2, cpus_per_node=2)
    stage.script(make_spec(**given), request=request)
    rundir = RunDir(stage.run_dir)
    job = site.backend.submit(rundir, SPEC, request)
    site.jobs.append(job)
    return stage, rundir, job


@pytest.mark.parametrize("name", ["plain", "per%j cent %N", 'it\'s $(touch canary) "here"'])
def test_one_agent_is_started_on_each_node_with_its_own_log(site: Site, name: str) -> None:
    stage, rundir, job = staged(site, name, setup="export AGENT_STATUS=7")
    wait_until(rundir.batch_status.exists, "the end of the batch script", 60)
    report = site.await_state((rundir, job), RunState.FAILED)
    assert (stage.status, report.exit_status) == (7, 7), rundir.batch_log.read_text()
    for node in site.cluster.nodes:
        seen = json.loads((stage.run_dir / "agents" / f"{node}.log").read_text())
        assert seen["SLURMD_NODENAME"] == node
        assert len(seen["CUDA_VISIBLE_DEVICES"].split(",")) == 2
        assert (seen["SLURMFORK_RUN_ID"], seen["SLURM_JOB_ID"]) == ("grpo-abc234", job.job_id)
        assert seen["SLURMFORK_KILL_WAIT"] == "5"
        assert seen["file"] == str(stage.run_dir / "agents" / f"{node}.log")  # no pipe between
    assert stage.swept == [["--run-dir", str(stage.run_dir), "--grace", "2"]]
    assert not list(site.home.glob("**/canary"))


def test_the_submitters_own_job_does_not_leak_into_the_agents(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a shell in a job: what would have srun refuse, or bind, or give nothing."""
    for name, value in {
        "SLURM_CPU_BIND": "mask_cpu:0x800",
        "SLURM_MEM_PER_CPU": "10",
        "SLURM_MEM_PER_NODE": "10",
        "SLURM_NTASKS": "64",
        "SBATCH_EXCLUSIVE": "user",
        "SLURM_EXPORT_ENV": "NONE",
        "SBATCH_EXPORT": "NONE",
        "SLURMFORK_NODE": "outer",
        "SLURMFORK_RUN_ID": "outer-abc234",
    }.items():
        monkeypatch.setenv(name, value)
    stage, rundir, job = staged(site)
    wait_until(rundir.batch_status.exists, "the end of the batch script", 60)
    assert stage.status == 0, rundir.batch_log.read_text()
    assert job.notes[0] == "SBATCH_EXCLUSIVE is set and ignored: put exclusive into slurm:"
    assert sorted(path.name for path in (stage.run_dir / "agents").iterdir()) == [
        f"{node}.log" for node in site.cluster.nodes
    ]


def test_a_head_that_did_not_end_in_order_has_every_node_swept(site: Site) -> None:
    stage, rundir, _ = staged(site, setup='touch "$SLURMFORK_RUN_DIR/no-end"')
    wait_until(rundir.batch_status.exists, "the end of the batch script", 90)
    swept = [words[4:] for words in stage.swept]
    assert sorted(swept[:-1]) == [["--node", node] for node in site.cluster.nodes]
    assert swept[-1] == []


def test_a_setup_that_fails_is_the_jobs_failure(site: Site) -> None:
    stage, rundir, job = staged(site, setup="no_such_module_here")
    report = site.await_state((rundir, job), RunState.FAILED)
    assert (report.exit_status, stage.status) == (127, 127)
    assert "setup lines ended with status 127" in rundir.batch_log.read_text().splitlines()[-1]


def test_scancel_during_setup(site: Site) -> None:
    stage, rundir, job = staged(site, setup='touch "$SLURMFORK_RUN_DIR/begun"\nsleep 100')
    wait_until((stage.run_dir / "begun").exists, "the setup lines")
    site.cluster.run(["scancel", job.job_id])
    site.await_state((rundir, job), RunState.CANCELLED)
    assert stage.status == 143
    assert not (stage.run_dir / "agents" / f"{site.cluster.nodes[0]}.log").exists()
