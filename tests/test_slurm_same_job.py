"""The same job, wherever it is submitted: from a clean shell, from inside of another job, from a login that leaks."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Factory, MiniCluster
from processes import wait_until
from running import Shell

from slurmfork.head import scheduler

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

LEAKED = {  # what profiles, modules and shells in other jobs leave behind
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "elsewhere[1-9]",
    "SLURM_NTASKS": "64",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_CPUS_PER_TASK": "3",
    "SLURM_TRES_PER_TASK": "cpu:7",
    "SLURM_MEM_PER_CPU": "10",
    "SLURM_MEM_PER_NODE": "10",
    "SLURM_CPU_BIND": "mask_cpu:0x800",
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_EXCLUSIVE": "user",
    "SLURM_HINT": "nomultithread",
    "SLURM_TIME_FORMAT": "relative",
    "SLURM_SPANK_X": "1",
    "_SLURM_SPANK_OPTION_x11_x11": "1",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_PARTITION": "spare",
    "SBATCH_ARRAY_INX": "1-3",
    "SBATCH_REQUEUE": "1",
    "SRUN_CPUS_PER_TASK": "1",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_STATES": "PENDING",
    "SACCT_FORMAT": "jobid",
    "CUDA_VISIBLE_DEVICES": "7",
    "ROCR_VISIBLE_DEVICES": "7",
    "GPU_DEVICE_ORDINAL": "7",
    "PMI_RANK": "3",
    "OMPI_COMM_WORLD_RANK": "3",
    "TMPDIR": "/scratch/slurm.4242",
}

SPEC = """
    name: same
    nodes: 1
    slurm: {{gpus-per-node: 2, nodelist: {node}, time: "00:10:00"}}
    setup: env -0 >"$SLURMFORK_RUN_DIR/batch.env"
    roles:
      only: {{gpus: 1, command: [sh, -c, 'env -0 >"$SLURMFORK_RUN_DIR/worker.env"']}}
"""

# A shell on a terminal keeps its size in COLUMNS and LINES.
OF_THIS_JOB = re.compile(
    r"COLUMNS|LINES|PYTEST_CURRENT_TEST|SLURM_(JOB_?ID|JOB_(START|END)_TIME|TASK_PID)|MASTER_PORT|SLURM_TOPOLOGY_ADDR"
)


@pytest.fixture
def cluster(minicluster: Factory) -> MiniCluster:
    return minicluster(nodes=2, gpus=4)


@pytest.fixture
def shell(tmp_path: Path, cluster: MiniCluster) -> Iterator[Shell]:
    made = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    yield made
    made.end()


def outcome(shell: Shell, cluster: MiniCluster, run_id: str) -> dict[str, object]:
    """The job as Slurm has it, and the environments of batch script and worker, but for what is each job's own."""
    shell.runs.append(run_id)
    assert shell.call("wait", run_id).returncode == 0, shell.logs(run_id)
    job_id = shell.status(run_id)["job_id"]
    show = ["scontrol", "-o", "show", "job", job_id]
    wait_until(lambda: "JobState=COMPLETED" in cluster.run(show).stdout, "Slurm to call the job completed")
    shown = cluster.run(show).stdout.split()
    timeless = [
        word for word in shown if not re.match(r"\w*(Time|Eval|AccrueTime|Priority|AllocNode:Sid|Scheduler)=", word)
    ]
    return {
        "job": [word.replace(run_id, "RUN").replace(f"JobId={job_id}", "JobId=JOB") for word in timeless],
        **{kind: variables(shell.root / run_id / f"{kind}.env", run_id) for kind in ("batch", "worker")},
    }


def variables(path: Path, run_id: str) -> dict[str, str]:
    text = path.read_text().replace(run_id, "RUN")
    found = dict(line.split("=", 1) for line in text.split("\0") if line)
    return {name: value for name, value in found.items() if not OF_THIS_JOB.fullmatch(name)}


@pytest.fixture
def clean(shell: Shell, cluster: MiniCluster) -> dict[str, object]:
    spec = shell.spec(SPEC.format(node=cluster.nodes[1]))
    return outcome(shell, cluster, shell.json("submit", str(spec))["run_id"])


def test_from_a_shell_in_an_allocation(shell: Shell, cluster: MiniCluster, clean: dict[str, object]) -> None:
    """A step with GPUs, CPUs and memory of its own, as an interactive one has them."""
    asked = ["--nodes=1", "--ntasks=1", "--cpus-per-task=3", "--gpus-per-node=1", f"--nodelist={cluster.nodes[0]}"]
    submit = [shell.python, "-m", "slurmfork", "submit", "--json", str(shell.directory / "spec.yaml")]
    cluster.env = {**cluster.env, "SLURMFORK_ROOT": str(shell.root)}
    done = cluster.run(["srun", "--quiet", *asked, "--chdir", str(shell.directory), *submit], limit_s=120)
    inner = outcome(shell, cluster, json.loads(done.stdout)["run_id"])
    assert inner["job"] == clean["job"]
    for kind in ("batch", "worker"):
        others = {name: value for name, value in inner[kind].items() if name in clean[kind]}
        assert others == {name: clean[kind][name] for name in others}
        assert not [name for name in set(inner[kind]) - set(clean[kind]) if name.startswith(("SLURM", "PMI", "CUDA"))]


@pytest.mark.parametrize("leaked", [{"SBATCH_EXPORT": "NONE"}, LEAKED], ids=["export-none", "login"])
def test_from_an_environment_that_leaks(
    shell: Shell, cluster: MiniCluster, clean: dict[str, object], leaked: dict[str, str]
) -> None:
    shell.env.update(leaked)
    submitted = shell.json("submit", str(shell.directory / "spec.yaml"))
    for name in leaked:
        del shell.env[name]
    found = outcome(shell, cluster, submitted["run_id"])
    assert set(found["job"]) ^ set(clean["job"]) == set()
    assert found == clean
    told = {note.split()[0] for note in submitted["notes"]}
    assert told <= {name for name in leaked if name.startswith("SBATCH_")}
    assert "SBATCH_EXPORT" in told


def test_what_the_setup_lines_leak_does_not_change_what_the_head_is_told(shell: Shell, cluster: MiniCluster) -> None:
    """The addresses of nodes, and the time that is left, are asked for from inside of the job."""
    lines = "; ".join(f"export {name}=x" for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SLURM_CLUSTERS"))
    spec = shell.spec(SPEC.format(node=cluster.nodes[1]))
    run_id = shell.submit(spec, "--set", f"setup={lines}; env -0 >$SLURMFORK_RUN_DIR/batch.env")
    assert shell.call("wait", run_id).returncode == 0, shell.logs(run_id)
    [node] = shell.status(run_id)["nodes"]
    assert node["address"].startswith("127.0."), node
    assert "SLURM_CLUSTERS" not in variables(shell.root / run_id / "worker.env", run_id)


def test_a_command_of_slurms_that_does_not_answer_the_head_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQUEUE_SORT", "x")
    output = asyncio.run(scheduler.ask("env"))
    assert output is not None
    assert "SQUEUE_SORT" not in output
    pid = tmp_path / "pid"
    assert asyncio.run(scheduler.ask("sh", "-c", f"echo $$ >{pid}; exec sleep 1000", patience=1)) is None
    wait_until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), "the command to be gone")


ASKED_BY_TASK = """
{% extends "sbatch.sh.j2" %}
{% block directives %}
#SBATCH --nodes=1 --ntasks-per-node=4 --gpus-per-task=1 --cpus-per-task=1 --no-requeue
#SBATCH --output={{ run_dir | sbatch_value }}/batch.log --open-mode=append MORE
{% endblock %}
"""


def with_template(shell: Shell, cluster: MiniCluster, more: str) -> list[str]:
    template = shell.directory / "by-task.sh.j2"
    template.write_text(ASKED_BY_TASK.replace("MORE", more))
    spec = shell.spec(SPEC.format(node=cluster.nodes[1]))
    return [str(spec), "--template", str(template), "--set", "roles.only.gpus=4", "--set", "slurm.gpus-per-node=4"]


def test_gpus_that_a_template_asks_for_by_task_are_all_the_agents(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.json("submit", *with_template(shell, cluster, ""))["run_id"]
    shell.runs.append(run_id)
    assert shell.call("wait", run_id).returncode == 0, shell.logs(run_id)
    seen = variables(shell.root / run_id / "worker.env", run_id)
    assert seen["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("more", "words", "scripts"),
    [
        ("--array=1-2", "is an array: one run is one job", 2),
        ("\n#SBATCH hetjob\n#SBATCH --nodes=1", "is a heterogeneous job: a run is one job of like nodes", 1),
    ],
    ids=["array", "heterogeneous"],
)
def test_a_template_that_makes_of_it_what_no_run_is(
    shell: Shell, cluster: MiniCluster, more: str, words: str, scripts: int
) -> None:
    run_id = shell.json("submit", *with_template(shell, cluster, more))["run_id"]
    shell.runs.append(run_id)
    log = shell.root / run_id / "batch.log"
    wait_until(lambda: log.exists() and log.read_text().count(words) == scripts, "the refusal")
    assert not list((shell.root / run_id / "agents").iterdir())
    wait_until(lambda: shell.status(run_id)["state"] == "failed", "the run to have failed", 120)


def test_a_uid_that_the_machine_does_not_know(shell: Shell) -> None:
    """In a user namespace, where this user is another number, and has no home by the system's word."""
    spec = shell.spec("name: nobody\nroles: {a: {command: 'true'}}\n")
    number = ["unshare", "--user", "--map-user=54321", "--map-group=54321", "env", "-u", "HOME", "-u", "USER"]
    own = [*number, "-u", "LOGNAME", shell.python, "-m", "slurmfork"]

    def call(*words: str, rootless: bool = False) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in shell.env.items() if not (rootless and name == "SLURMFORK_ROOT")}
        return subprocess.run([*own, *words], env=env, capture_output=True, text=True, timeout=120, check=False)

    if subprocess.run([*number, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    homeless = call("submit", str(spec), "--backend", "local", rootless=True)
    told = "slurmfork: uid 54321 has no home directory here: set HOME, and --root for runs\n"
    assert (homeless.returncode, homeless.stderr) == (2, told)
    done = call("submit", str(spec), "--backend", "local", "--json")
    assert done.returncode == 0, done.stderr
    run_id = json.loads(done.stdout)["run_id"]
    assert call("wait", run_id).returncode == 0
    assert json.loads((shell.root / run_id / "run.json").read_text())["user"] == "54321"
    found = {check["name"]: check for check in json.loads(call("doctor", "-b", "local", "--json").stdout)["checks"]}
    assert found["account"]["detail"] == "uid 54321 has no name on this machine"
