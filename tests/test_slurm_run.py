"""Whole runs on a real Slurm, by the command line, as a user of a cluster has them."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Factory, MiniCluster
from processes import wait_until
from running import Shell, command_of, environ_of

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"

GRPO = """
    name: grpo
    nodes: 4
    slurm: {gpus-per-node: 8, time: "00:30:00"}
    roles:
      rollout: {replicas: 16, gpus: 1, command: [sleep, "1000"]}
      trainer: {replicas: 16, gpus: 1, command: [sleep, "1001"]}
      eval:
        strategy: {type: colocation, target: rollout}
        autostart: false
        command: [sleep, "1002"]
"""


@pytest.fixture
def cluster(minicluster: Factory) -> MiniCluster:
    return minicluster(nodes=4, gpus=8)


@pytest.fixture
def shell(tmp_path: Path, cluster: MiniCluster) -> Iterator[Shell]:
    made = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    yield made
    made.end()


def slurm_state(cluster: MiniCluster, job_id: str) -> str:
    words = cluster.run(["scontrol", "-o", "show", "job", job_id]).stdout.split()
    return next(word.partition("=")[2] for word in words if word.startswith("JobState="))


def test_the_main_job(shell: Shell, cluster: MiniCluster) -> None:
    """16 rollout and 16 trainer workers, 16 children forked beside rollout, stopped, and all cancelled."""
    run_id = shell.ready(shell.spec(GRPO))
    primaries = shell.ps(run_id)
    assert len(primaries) == 32
    owned = [(view["node"], gpu) for view in primaries for gpu in view["gpus"]]
    assert len(set(owned)) == len(owned) == 32
    for view in primaries:
        assert environ_of(view["pid"])["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, view["gpus"]))
        assert command_of(view["pid"])[0] == "sleep", "the recorded PID is the worker itself"

    shell.json("fork", run_id, "eval", "--target", "rollout")
    views = {view["worker"]: view for view in shell.ps(run_id)}
    assert len(views) == 48
    assert len({view["pid"] for view in views.values()}) == 48
    for index in range(16):
        child, target = views[f"eval/{index}"], views[f"rollout/{index}"]
        assert (child["target"], child["node"]) == (f"rollout/{index}", target["node"])
        assert child["gpus"] == target["gpus"]
        seen = environ_of(child["pid"])
        assert seen["CUDA_VISIBLE_DEVICES"] == environ_of(target["pid"])["CUDA_VISIBLE_DEVICES"]
        assert seen["SLURMFORK_TARGET"] == f"rollout/{index}"
        assert command_of(child["pid"]) == ["sleep", "1002"]

    stopped = shell.json("stop", run_id, "eval")
    assert (len(stopped["stopped"]), stopped["survivors"]) == (16, 0)
    assert {view["pid"] for view in shell.ps(run_id) if view["state"] == "running"} == {v["pid"] for v in primaries}

    job_id = shell.status(run_id)["job_id"]
    cancelled = shell.json("cancel", run_id)
    assert (cancelled["state"], cancelled["survivors"]) == ("cancelled", 0)
    assert shell.left(run_id) == []
    assert shell.status(run_id)["state"] == "cancelled"
    wait_until(lambda: slurm_state(cluster, job_id) == "CANCELLED", "Slurm to call the job cancelled")


@pytest.mark.timeout(1200)  # the first installs PyTorch
def test_pytorch_trains_with_nothing_but_the_contract(shell: Shell, torch_python: str) -> None:
    command = json.dumps([torch_python, str(EXAMPLES / "ddp.py")])
    run_id = shell.submit(EXAMPLES / "ddp.yaml", "--set", f"roles.trainer.command={command}")
    done = shell.call("wait", run_id, timeout=240)
    log = (shell.root / run_id / "logs" / "trainer-0.log").read_text()
    assert done.returncode == 0, f"{done.stderr}\n{log}\n{shell.logs(run_id)}"
    assert shell.status(run_id)["state"] == "completed"
    losses = [float(line.split()[-1]) for line in log.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0] / 2
    assert "world 4" in log


def test_a_second_shell_has_the_run_when_the_first_is_closed(shell: Shell, cluster: MiniCluster) -> None:
    submitting = shell.start("submit", str(shell.spec(GRPO)), "--json")
    output, _ = submitting.communicate(timeout=60)
    run_id = json.loads(output)["run_id"]
    shell.runs.append(run_id)
    second = Shell(shell.directory, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    assert second.call("wait", run_id, "--for", "ready").returncode == 0
    second.json("fork", run_id, "hello", "--target", "rollout/0", "--", "sh", "-c", "echo hello there; sleep 1000")
    following = second.start("logs", "-f", run_id, "hello")
    assert following.stdout is not None
    assert "hello there" in following.stdout.readline()
    assert second.json("cancel", run_id)["survivors"] == 0
    assert following.wait(timeout=60) == 0, "logs -f ends with the run"


def test_scancel_from_outside_lets_workers_end_in_their_own_way(shell: Shell, cluster: MiniCluster) -> None:
    """Slurm's SIGTERM goes everywhere at once; workers still get their grace, and nothing is left."""
    spec = shell.spec(
        """
        name: outside
        nodes: 2
        slurm: {gpus-per-node: 1}
        roles:
          a:
            per_node: 2
            stop: {grace: 4}
            command: |
              trap 'trap "" TERM; sleep 1; echo saved; exit 0' TERM
              echo up; while :; do sleep 0.1; done
          b: {per_node: 1, command: "setsid sleep 1003 & exec setsid sleep 1004"}
        """
    )
    run_id = shell.ready(spec)
    logs = [shell.root / run_id / "logs" / f"a-{index}.log" for index in range(4)]
    wait_until(lambda: all("up" in log.read_text() for log in logs), "the workers to set their traps")
    cluster.run(["scancel", shell.status(run_id)["job_id"]])
    shell.call("wait", run_id)
    status = shell.status(run_id)
    assert status["state"] == "cancelled", status
    assert status["survivors"] == 0
    wait_until(lambda: shell.left(run_id) == [], "everything to be gone")
    assert all("saved" in log.read_text() for log in logs), shell.logs(run_id)


def test_a_pending_job_is_cancelled_at_once(shell: Shell, cluster: MiniCluster) -> None:
    filler = shell.ready(shell.spec(GRPO, "first.yaml"), "--set", "name=filler")
    run_id = shell.submit(shell.spec(GRPO))
    assert shell.status(run_id)["state"] == "pending"
    cancelled = shell.json("cancel", run_id)
    assert (cancelled["state"], cancelled["survivors"]) == ("cancelled", 0)
    assert shell.status(run_id)["state"] == "cancelled"
    assert shell.status(filler)["state"] == "ready"


def small(command: str, more: str = "") -> str:
    return f"""
        name: small
        nodes: 1
        slurm: {{gpus-per-node: 1}}
        roles:
          only: {{gpus: 1, command: {command}{more}}}
    """


@pytest.mark.parametrize(
    ("command", "more", "status", "words"),
    [
        ("[sh, -c, 'echo oh no; exit 3']", "", 3, "only/0 failed: exited with 3"),
        ("[no-such-command]", "", 127, "no-such-command"),
        ("[sleep, '1000']", ", ready: {notify: true, timeout: 0.5}", None, "not ready within 0.5 s"),
    ],
    ids=["exits", "missing", "never-ready"],
)
def test_a_failing_worker_ends_the_run_with_its_own_status(
    shell: Shell, command: str, more: str, status: int | None, words: str
) -> None:
    run_id = shell.submit(shell.spec(small(command, more)))
    done = shell.call("wait", run_id)
    seen = shell.status(run_id)
    assert seen["state"] == "failed", shell.logs(run_id)
    assert words in seen["reason"], seen["reason"]
    if status is not None:
        assert done.returncode == seen["exit_status"] == status
    else:
        assert done.returncode != 0
    assert shell.left(run_id) == []


def test_a_secret_reaches_the_workers_and_nobody_else(shell: Shell, cluster: MiniCluster) -> None:
    shell.env["MYSECRET"] = value = secrets.token_hex(16)
    run_id = shell.ready(shell.spec(small("[sleep, '1000']")), "--set", "secrets=[MYSECRET]")
    [worker] = shell.ps(run_id)
    assert environ_of(worker["pid"])["MYSECRET"] == value
    [node] = shell.status(run_id)["nodes"]
    head = json.loads((shell.root / run_id / "head.json").read_text())["pid"]
    for pid in (head, node["guardian_pid"], node["agent_pid"]):
        assert "MYSECRET" not in environ_of(pid)
    stored = subprocess.run(["grep", "-rlF", value, str(cluster.home)], capture_output=True, text=True, check=False)
    assert (stored.returncode, stored.stdout) == (1, "")


def test_the_log_of_a_crash_at_start_is_told(shell: Shell) -> None:
    spec = shell.spec(small("[sh, -c, 'echo the very reason; exit 3']"))
    done = shell.call("submit", str(spec), "--wait")
    shell.runs += [entry.name for entry in shell.root.iterdir()]
    assert done.returncode == 3, done.stderr
    assert "the very reason" in done.stdout + done.stderr


def test_slurms_exit_code_is_the_workers(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.submit(shell.spec(small("[sh, -c, 'exit 3']")))
    shell.call("wait", run_id)
    job_id = shell.status(run_id)["job_id"]
    wait_until(lambda: slurm_state(cluster, job_id) == "FAILED", "the job to end")
    assert "ExitCode=3:0" in cluster.run(["scontrol", "-o", "show", "job", job_id]).stdout


def test_a_partition_that_does_not_exist(shell: Shell) -> None:
    done = shell.call("submit", str(shell.spec(small("[sleep, '1']"))), "--set", "slurm.partition=gpuu")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "partition" in done.stderr
    assert not list(shell.root.glob("*")), "nothing was submitted, nothing is left behind"


def test_a_run_directory_that_nodes_do_not_see(shell: Shell, tmp_path: Path) -> None:
    """A root that only the submitting process has: a tmpfs in a mount namespace of its own."""
    private = tmp_path / "private"
    private.mkdir()
    spec = shell.spec(small("[sleep, '1']"))
    lines = (
        'mount -t tmpfs none "$1" && "$2" -m slurmfork submit --root "$1" "$3" >&2 && '
        '"$2" -m slurmfork wait --root "$1" last >&2; "$2" -m slurmfork status --root "$1" last --json'
    )
    argv = ["unshare", "-m", "sh", "-c", lines, "sh", str(private), sys.executable, str(spec)]
    done = subprocess.run(argv, env=shell.env, capture_output=True, text=True, timeout=120, check=False)
    status = json.loads(done.stdout)["runs"][0]
    assert status["state"] == "failed", done.stdout + done.stderr
    assert "--root" in status["reason"], status["reason"]


BLIND_NODE = """
{% extends "sbatch.sh.j2" %}
{% block launcher %}
{{ super() }}
slurmfork_launcher=(
  "${slurmfork_srun[@]}" bash -c '[ "$SLURMD_NODENAME" != NODE ] || SLURMFORK_RUN_DIR=/nonexistent'"$slurmfork_on_node"
  node "$slurmfork_python" -I "$slurmfork_package/agent/__main__.py"
)
{% endblock %}
"""


def test_one_node_of_several_that_does_not_see_the_run_directory(
    shell: Shell, cluster: MiniCluster, tmp_path: Path
) -> None:
    one, blind = cluster.nodes[:2]
    template = tmp_path / "blind.sh.j2"
    template.write_text(BLIND_NODE.replace("!= NODE", f"!= {blind}"))
    text = f"name: blind\nnodes: 2\nslurm: {{nodelist: '{one},{blind}'}}\nroles: {{w: {{command: [sleep, '1000']}}}}\n"
    spec = shell.spec(text)
    run_id = shell.submit(spec, "--template", str(template))
    assert shell.call("wait", run_id).returncode == 1
    status = shell.status(run_id)
    assert (status["state"], status["survivors"]) == ("failed", 0), status
    assert status["reason"].startswith(f"node {blind} cannot take part: it does not see the run directory"), status


NO_STEP = """
{% extends "sbatch.sh.j2" %}
{% block launcher %}
{{ super() }}
slurmfork_launcher=("${slurmfork_srun[@]}" --nodelist=nowhere true)
{% endblock %}
"""


def test_what_srun_says_of_a_step_that_it_cannot_make_is_the_reason(shell: Shell, tmp_path: Path) -> None:
    template = tmp_path / "no-step.sh.j2"
    template.write_text(NO_STEP)
    run_id = shell.submit(shell.spec(small("[sleep, '1000']")), "--template", str(template))
    assert shell.call("wait", run_id).returncode == 1
    status = shell.status(run_id)
    assert (status["state"], status["survivors"]) == ("failed", 0), status
    begin = "the agents' launcher (srun) ended with 1: "
    assert status["reason"].startswith(begin), status
    assert "Unable to create step" in status["reason"], status


def test_states_without_squeue(shell: Shell, cluster: MiniCluster) -> None:
    """A finished run is told rightly when Slurm has forgotten the job, accounting or not."""
    run_id = shell.submit(shell.spec(small("[sh, -c, 'exit 0']")))
    assert shell.call("wait", run_id).returncode == 0
    shell.env["PATH"] = "/nonexistent"
    assert shell.status(run_id)["state"] == "completed"


def test_status_in_a_loop_asks_squeue_at_most_every_ten_seconds(shell: Shell, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    count = tmp_path / "count"
    count.touch()
    counting = tools / "squeue"
    counting.write_text(f'#!/bin/sh\necho x >>"{count}"\nexec /usr/bin/squeue "$@"\n')
    counting.chmod(0o755)
    shell.env["PATH"] = f"{tools}:{shell.env['PATH']}"
    runs = [shell.submit(shell.spec(GRPO)) for _ in range(3)]
    began = time.monotonic()
    for _ in range(8):
        shell.json("status")
    took = time.monotonic() - began
    assert len(runs) == 3
    assert len(count.read_text().splitlines()) <= 1 + took / 10 + 1


def test_a_time_limit_ends_the_run_as_timeout(shell: Shell, cluster: MiniCluster) -> None:
    run_id = shell.ready(shell.spec(small("[sleep, '1000']")), "--set", "slurm.time='01:00:00'")
    job_id = shell.status(run_id)["job_id"]
    cluster.run(["scontrol", "update", f"JobId={job_id}", "TimeLimit=1"])
    done = shell.call("wait", run_id, timeout=180)
    assert shell.status(run_id)["state"] == "timeout", shell.logs(run_id)
    assert done.returncode != 0


def test_a_dead_agent_ends_the_run_and_leaves_nothing(shell: Shell) -> None:
    run_id = shell.ready(shell.spec(GRPO))
    node = shell.status(run_id)["nodes"][1]
    os.kill(node["agent_pid"], signal.SIGKILL)
    shell.call("wait", run_id)
    assert shell.status(run_id)["state"] == "failed"
    assert node["node"] in shell.status(run_id)["reason"]
    wait_until(lambda: shell.left(run_id) == [], "everything to be gone")


REQUEUED = """
    name: requeued
    requeue: true
    slurm: {time: 2}
    roles:
      w:
        checkpoint: {signal: USR1, before: 30}
        stop: {grace: 1}
        command: [bash, -c, "trap 'echo saved $SLURMFORK_ATTEMPT' USR1; while :; do sleep 0.2; done"]
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_comes_back_after_its_time_limit(shell: Shell, cluster: MiniCluster) -> None:
    """Its workers are warned, it is requeued, and the next attempt is the same run."""
    run_id = shell.ready(shell.spec(REQUEUED))
    job_id = shell.status(run_id)["job_id"]
    first = shell.ps(run_id)[0]["pid"]
    log = shell.root / run_id / "logs" / "w-0.log"
    wait_until(lambda: "saved 0" in log.read_text(), "the warning", timeout=180)
    wait_until(lambda: slurm_state(cluster, job_id) == "PENDING", "the job to be requeued", timeout=120)
    assert shell.status(run_id)["state"] == "pending"
    cluster.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"])
    assert shell.call("wait", run_id, "--for", "ready").returncode == 0
    status = shell.status(run_id)
    assert (status["state"], status["attempt"], status["job_id"]) == ("ready", 1, job_id)
    assert shell.ps(run_id)[0]["pid"] != first
    cluster.run(["scancel", "--batch", "--signal=USR1", job_id])  # a preemption's warning comes at any time
    wait_until(lambda: "saved 1" in log.read_text(), "the second attempt to be warned")
