"""What doctor says of a cluster: by settings as `scontrol show config` prints them, and of a real Slurm set up so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import MiniCluster
from running import Shell

from slurmfork.backends.base import Check
from slurmfork.backends.slurm_commands import Answer
from slurmfork.doctor import asking, ending, giving, machine, place, starting
from slurmfork.doctor.site import Site, records_of, release_of, settings_of

CONFIG = """\
Configuration data as of 2026-11-26T02:47:19
AccountingStorageType   = accounting_storage/none
GresTypes               = gpu,shard
JobContainerType        = job_container/none
KillWait                = 5 sec
MinJobAge               = 300 sec
PrivateData             = none
ProctrackType           = proctrack/linuxproc
SlurmctldParameters     = (null)
SLURM_VERSION           = 22.05.8
TaskPluginParam         = (null type)
Power Plugin            =

Cgroup Support Configuration:
ConstrainDevices        = yes
SignalChildrenProcesses = (null)

Slurmctld(primary) at vm is UP
"""


def said(check: Callable[[Site], Check | None], **settings: str) -> str | None:
    """All words of a check of a site with these settings; None where it says nothing."""
    found = check(Site({**settings_of(CONFIG), **settings}, client="slurm-wlm 22.05.8"))
    return found and " | ".join((str(found.ok), found.detail, found.means, found.todo))


def test_settings_are_read_as_they_are_printed() -> None:
    site = Site(settings_of(CONFIG))
    assert (site.release, site.seconds("KillWait"), site.plugin("ProctrackType")) == ((22, 5), 5, "linuxproc")
    assert site.words("GresTypes") == {"gpu": "", "shard": ""}
    assert site.text("ConstrainDevices") == "yes"
    assert [site.text(name) for name in ("TaskPluginParam", "SlurmctldParameters", "Nothing", "PrivateData")] == [
        ""
    ] * 4
    assert site.seconds("Nothing") is None
    assert site.plugin("JobContainerType") == ""


def test_records_may_hold_blanks() -> None:
    text = "NodeName=n1 Arch=x86_64 Gres=gpu:4(S:0-1) OS=Linux 5.10.0-8-amd64 #1 SMP Debian 5.10.46-4 RealMemory=10 \n"
    [node] = records_of(text)
    assert (node["NodeName"], node["RealMemory"]) == ("n1", "10")
    assert node["OS"] == "Linux 5.10.0-8-amd64 #1 SMP Debian 5.10.46-4"


@pytest.mark.parametrize(
    ("text", "release"),
    [("slurm-wlm 20.11.4", (20, 11)), ("slurm 25.05.0-rc1", (25, 5)), ("26.05.5", (26, 5)), ("", (0, 0))],
)
def test_releases(text: str, release: tuple[int, int]) -> None:
    assert release_of(text) == release


@pytest.mark.parametrize(
    ("check", "settings", "words"),
    [
        (starting.release, {}, ["True", "22.05.8 answers"]),
        (starting.release, {"SLURM_VERSION": "20.02.7"}, ["False", "20.11 or later"]),
        (starting.release, {"SLURM_VERSION": "25.11.0"}, ["True", "load the Slurm module"]),
        (starting.release, {"SLURM_VERSION": "23.11.0"}, ["True |", "23.11.0 answers |  | "]),
        (starting.filters, {"JobSubmitPlugins": "lua", "CliFilterPlugins": "(null)"}, ["JobSubmitPlugins=lua |"]),
        (starting.interactive_step, {"LaunchParameters": "use_interactive_step"}, ["a job of its own"]),
        (starting.mpi, {"MpiDefault": "pmix"}, ["--mpi=none", "srun --overlap --mpi=pmix"]),
        (starting.binding, {"TaskPluginParam": "autobind=cores"}, ["autobind=cores", "--cpu-bind=none"]),
        (starting.firewall, {"SrunPortRange": "60000-61000"}, ["firewall"]),
        (giving.gpus, {"GresTypes": "(null)"}, ["GresTypes has no gpu |"]),
        (giving.gpus, {"GresTypes": "nvme"}, ["GresTypes has no gpu (nvme) |"]),
        (giving.shared_gpus, {}, ["GresTypes has shard", "gres: shard:N"]),
        (giving.devices, {}, ["devices are not constrained"]),
        (giving.devices, {"TaskPlugin": "task/cgroup,task/affinity"}, ["ConstrainDevices=yes", "SLURM_STEP_GPUS"]),
        (giving.private_tmp, {"JobContainerType": "job_container/tmpfs"}, ["tmpfs |", "gone at its end"]),
        (giving.private_tmp, {"NamespaceType": "namespace/linux"}, ["linux |", "PIDs"]),
        (giving.adoption, {}, ["no PrologFlags=Contain"]),
        (giving.adoption, {"PrologFlags": "Alloc,Contain", "ProctrackType": "proctrack/cgroup"}, ["pam_slurm_adopt"]),
        (ending.tracker, {}, ["proctrack/linuxproc", "daemons escape", "isolation: auto"]),
        (ending.tracker, {"ProctrackType": "proctrack/pgid"}, ["sessions escape"]),
        (ending.tracker, {"ProctrackType": "proctrack/cgroup"}, ["Slurm itself ends"]),
        (
            ending.tracker,
            {"ProctrackType": "proctrack/cgroup", "SignalChildrenProcesses": "yes"},
            ["its SIGTERM reaches workers"],
        ),
        (ending.grace, {}, ["KillWait is 5 s |", "workers have 3 s"]),
        (ending.grace, {"KillWait": "2 sec"}, ["KillWait is 2 s, and Slurm gives 5", "workers have 3 s"]),
        (ending.grace, {"KillWait": "30 sec"}, ["workers have 28 s"]),
        (ending.preemption, {"PreemptType": "preempt/qos", "PreemptMode": "REQUEUE"}, ["only with `requeue: true`"]),
        (ending.preemption, {"PreemptType": "preempt/qos", "PreemptMode": "GANG,SUSPEND"}, ["stands still"]),
        (
            ending.preemption,
            {"PreemptType": "preempt/qos", "PreemptMode": "CANCEL", "PreemptParameters": "send_user_signal"},
            ["the warning comes first"],
        ),
        (asking.rate_limit, {"SlurmctldParameters": "rl_enable"}, ["30 questions at once, 2 more", "23.02, fail"]),
        (asking.private_data, {"PrivateData": "jobs,nodes"}, ["others' jobs", "not by Slurm's NodeAddr"]),
        (asking.private_data, {"PrivateData": "usage"}, ["nothing that slurmfork asks for"]),
    ],
)
def test_what_holds_is_told(check: Callable[[Site], Check | None], settings: dict[str, str], words: list[str]) -> None:
    told = said(check, **settings)
    assert told is not None
    assert [word for word in words if word not in told] == [], told


@pytest.mark.parametrize(
    "check",
    [
        starting.filters,
        starting.environment,
        starting.interactive_step,
        starting.mpi,
        starting.binding,
        starting.firewall,
        starting.root_jobs,
        giving.gpus,
        giving.private_tmp,
        ending.preemption,
        asking.rate_limit,
        asking.private_data,
        asking.accounting,
    ],
)
def test_what_does_not_hold_is_not_spoken_of(check: Callable[[Site], Check | None]) -> None:
    assert said(check, MpiDefault="none", PreemptType="preempt/none", SrunPortRange="0-0") is None


def test_a_newer_client_waits_where_an_older_one_fails() -> None:
    site = Site({"SlurmctldParameters": "rl_enable,rl_bucket_size=50,rl_refill_rate=5"}, client="slurm 24.11.5")
    found = asking.rate_limit(site)
    assert found is not None
    assert found.detail == "rl_enable: 50 questions at once, 5 more a second"
    assert "wait without a word" in found.means


@pytest.mark.parametrize(("age", "todo"), [("2 sec", "ask for such a job's `status` within 2 s"), ("300 sec", "")])
def test_without_accounting_slurm_forgets(age: str, todo: str) -> None:
    disabled = Answer(False, "", "Slurm accounting storage is disabled")
    found = asking.accounting(Site({"MinJobAge": age}, accounting=disabled))
    assert found is not None
    assert (found.ok, found.todo) == (True, todo)
    assert f"forgotten {age.split()[0]} s after" in found.detail


def test_a_partition_s_own_grace_and_modes() -> None:
    lines = "PartitionName=a GraceTime=120 PreemptMode=REQUEUE\nPartitionName=b GraceTime=0 PreemptMode=OFF\n"
    found = ending.preemption(Site({"PreemptType": "preempt/partition_prio"}, partitions=records_of(lines)))
    assert found is not None
    assert found.detail == "preempt/partition_prio, mode REQUEUE, GraceTime 120 s on a"
    assert ending.preemption(Site({"PreemptType": "preempt/qos"}, partitions=records_of(lines)[1:])) is None


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("Linux 5.10.0-8-amd64 #1 SMP Debian 5.10.46-4 (2021-08-03)", "Debian 11 has 3.9"),
        ("Linux 4.18.0-477.10.1.el8_8.x86_64 #1 SMP Tue May 16", "RHEL 8 and its kin have 3.6"),
        ("Linux 3.10.0-1160.el7.x86_64 #1 SMP", "RHEL 7 and its kin have 3.6"),
        ("Linux 6.18.0 #1 SMP", "3.10 or later"),
    ],
)
def test_the_python_that_nodes_have_is_told_by_their_kernel(kernel: str, words: str) -> None:
    found = starting.python_of_nodes(Site({}, nodes=[{"NodeName": "n1", "OS": kernel}]))
    assert words in found.means
    assert f"srun -n1 {sys.executable} --version" in found.todo


def test_an_old_slurm_makes_an_old_python_likely() -> None:
    assert "3.6 to 3.9" in starting.python_of_nodes(Site({"SLURM_VERSION": "20.11.4"})).means
    assert "3.6 to 3.9" not in starting.python_of_nodes(Site({"SLURM_VERSION": "24.11.5"})).means


def test_the_shell_s_own_variables_are_counted() -> None:
    given = {"PATH": "/bin", "SLURM_CONF": "/x", "SLURM_JOB_ID": "7", "SBATCH_QOS": "low", "SQUEUE_FORMAT": "%i"}
    found = starting.environment(Site({}, environment=given))
    assert found is not None
    assert found.detail == "3 variables of Slurm's are set: SBATCH_QOS, SLURM_JOB_ID, SQUEUE_FORMAT"
    assert "inside of job 7" in found.means
    assert found.todo == "what SBATCH_QOS should do, put into `slurm:`"


def test_no_partition_prevents_runs() -> None:
    assert not starting.partitions(Site({})).ok
    [one] = records_of("PartitionName=gpu Default=NO MaxTime=1:00 State=UP TotalNodes=3")
    found = starting.partitions(Site({}, partitions=[one]))
    assert (found.ok, found.detail) == (True, "gpu: 3 nodes, up, limit 1:00")
    assert "no default" in found.means


def test_isolation_is_tried_and_not_guessed() -> None:
    [found] = [check for check in machine.checks() if check.name == "isolation"]
    try:
        allowed = subprocess.run(["unshare", "--pid", "--fork", "--mount-proc", "--user", "-r", "true"], check=False)
        can = allowed.returncode == 0
    except FileNotFoundError:
        pytest.skip("no unshare here to compare with")
    assert found.ok
    assert found.detail.startswith("a PID namespace can be had" if can else "no PID namespace")


def test_a_root_that_others_can_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert [check.name for check in place.checks(tmp_path) if not check.ok] == ["root"]


# --- a real Slurm


@pytest.fixture(scope="module")
def peculiar() -> Iterator[MiniCluster]:
    """A cluster with as many peculiarities as one release has at once."""
    settings = [
        "PrivateData=jobs,nodes",
        "LaunchParameters=use_interactive_step",
        "PrologFlags=Contain",
        "SrunPortRange=60000-61000",
        "PreemptMode=REQUEUE",
        "KillWait=12",
    ]
    made = MiniCluster().up(nodes=1, gpus=2, set=settings, min_job_age=10)
    yield made
    made.down()


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_of_a_real_cluster(peculiar: MiniCluster, tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"SLURM_CONF": peculiar.env["SLURM_CONF"], "SBATCH_EXPORT": "NONE", "SLURM_JOB_ID": "5"})
    document = shell.json("doctor")
    found = {check["name"]: check for check in document["checks"]}
    assert document["ok"]
    assert found["private data"]["detail"] == "PrivateData=jobs,nodes"
    assert "opens its shell on a node" in found["interactive step"]["detail"]
    assert found["ports"]["detail"] == "SrunPortRange=60000-61000"
    assert found["preemption"]["detail"] == "preempt/partition_prio, mode REQUEUE, no GraceTime"
    assert found["grace"]["detail"] == "KillWait is 12 s"
    assert "forgotten 10 s after" in found["accounting"]["detail"]
    assert found["accounting"]["todo"]
    assert found["environment"]["detail"] == "2 variables of Slurm's are set: SBATCH_EXPORT, SLURM_JOB_ID"
    assert not {"gpus", "shared gpus", "private /tmp", "rate limit", "mpi"} & set(found)
    for check in document["checks"]:
        assert set(check) == {"name", "ok", "detail", "means", "todo"}
    text = shell.call("doctor")
    assert (text.returncode, text.stderr) == (0, "")
    assert text.stdout.splitlines()[-1] == "nothing here prevents runs"


@pytest.mark.slurm
def test_a_controller_that_does_not_answer_prevents_runs(tmp_path: Path) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(
        "ClusterName=away\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=2\nSlurmctldTimeout=5\n"
    )
    shell = Shell(tmp_path, {"SLURM_CONF": str(conf)})
    done = shell.call("doctor", "--backend", "slurm", "--json")
    document = json.loads(done.stdout)
    assert (done.returncode, document["ok"]) == (1, False)
    assert [check["name"] for check in document["checks"] if not check["ok"]] == ["slurm"]
    assert "Unable to contact slurm controller" in document["checks"][-1]["detail"]
    assert "scontrol ping" in document["checks"][-1]["todo"]
    assert os.environ.get("SLURM_CONF") != str(conf)
