"""Verbs with --cluster, from a client that has no Slurm and another home, to a real Slurm behind a real sshd."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from processes import wait_until
from running import Shell
from ssh_cluster import SshCluster, SshFactory

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SPEC = """
name: away
nodes: 2
slurm: {gpus-per-node: 2, time: 10}
roles:
  rollout:
    per_node: 2
    gpus: 1
    command: [sh, -c, "for i in $(seq 200); do echo $SLURMFORK_INDEX-$i; sleep 0.02; done; exec sleep 1000"]
  eval:
    autostart: false
    strategy: {type: colocation, target: rollout}
    command: [sleep, "1000"]
"""
PROFILES = """
[clusters.big]
host = "login"

[clusters.far]
host = "login-via-jump"
"""


class Away(Shell):
    """A laptop's shell: its own home, no Slurm on its PATH, two ways to one cluster."""

    def __init__(self, directory: Path, cluster: SshCluster) -> None:
        super().__init__(directory)
        self.cluster = cluster
        home, programs = directory / "home", directory / "bin"
        (home / ".ssh").mkdir(parents=True)
        (home / ".ssh" / "config").write_text(f"Include {cluster.config}\n")
        (home / "config.toml").write_text(PROFILES)
        programs.mkdir()
        del self.env["SLURMFORK_ROOT"]
        self.env |= {
            "HOME": str(home),
            "PATH": str(programs),
            "SLURMFORK_CONFIG": str(home / "config.toml"),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
        }

    def on(self, cluster: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        verb, *rest = arguments
        return self.call(verb, "--cluster", cluster, *rest, timeout=timeout)

    def told(self, cluster: str, *arguments: str) -> Any:
        verb, *rest = arguments
        return self.json(verb, "--cluster", cluster, *rest)

    def end(self) -> None:
        """Cancel what was submitted, and see that no process of that user's runs is left."""
        for run_id in self.runs:
            self.on("big", "cancel", run_id)
        assert [run_id for run_id in self.runs if self.left(run_id)] == []


@pytest.fixture(scope="module")
def cluster(ssh_cluster: SshFactory) -> SshCluster:
    return ssh_cluster(nodes=2)


@pytest.fixture(scope="module")
def furnished(cluster: SshCluster, tmp_path_factory: pytest.TempPathFactory) -> SshCluster:
    """The cluster with this very slurmfork on it, which is how a user begins."""
    away = Away(tmp_path_factory.mktemp("first"), cluster)
    refused = away.on("big", "status")
    assert refused.returncode == 1
    assert "`slurmfork cluster bootstrap big` puts it there" in refused.stderr
    done = away.call("cluster", "bootstrap", "big", timeout=600)
    assert done.returncode == 0, done.stderr
    again = away.call("cluster", "bootstrap", "far", timeout=600)
    assert "already: nothing was sent" in again.stdout, again.stderr
    return cluster


@pytest.fixture
def away(tmp_path: Path, furnished: SshCluster) -> Iterator[Away]:
    made = Away(tmp_path, furnished)
    yield made
    made.end()


def submit(away: Away, cluster: str, text: str = SPEC) -> str:
    run_id: str = away.told(cluster, "submit", str(away.spec(text)))["run_id"]
    away.runs.append(run_id)
    return run_id


@pytest.mark.parametrize("way", ["big", "far"], ids=["direct", "by the jump host"])
def test_the_main_job_from_afar(away: Away, way: str) -> None:
    run_id = submit(away, way)
    away.told(way, "wait", run_id, "--for", "ready")
    children = away.told(way, "fork", run_id, "eval")["workers"]
    assert len(children) == 4
    assert {view["node"] for view in children} == {view["node"] for view in away.told(way, "ps", run_id)["workers"]}
    stopped = away.told(way, "stop", run_id, "eval/0")
    assert (stopped["stopped"], stopped["survivors"]) == (["eval/0"], 0)
    ended = away.told(way, "cancel", run_id)
    assert (ended["state"], ended["survivors"]) == ("cancelled", 0)
    (run,) = away.told(way, "status", run_id)["runs"]
    assert run["state"] == "cancelled"
    owner = (away.cluster.user_home / ".slurmfork" / "runs" / run_id).stat().st_uid
    assert owner == away.cluster.user_home.stat().st_uid


def test_the_code_goes_along(away: Away) -> None:
    (away.directory / "code").mkdir()
    (away.directory / "code" / "worker.py").write_text(
        "print('from', 'afar', flush=True)\nimport time; time.sleep(1000)\n"
    )
    spec = "name: code\ncode: code\nslurm: {time: 10}\nroles:\n  a: {command: [python3, worker.py]}\n"
    run_id = submit(away, "big", spec)
    away.told("big", "wait", run_id, "--for", "ready")
    wait_until(lambda: "from afar" in away.on("big", "logs", run_id, "a/0").stdout, "the worker to speak")


def test_a_log_is_followed_while_connections_break(away: Away) -> None:
    run_id = submit(away, "big")
    away.told("big", "wait", run_id, "--for", "ready")
    following = away.start("logs", "--cluster", "big", run_id, "-f")
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(following.stdout or ()))
    reading.start()
    for enough in (50, 250, 500):
        wait_until(lambda enough=enough: len(lines) > enough, "lines")
        wait_until(away.cluster.drop, "a connection to break: the last one may still be on its way back")
    wait_until(lambda: sum("-200" in line for line in lines) == 4, "all lines")
    assert away.on("big", "cancel", run_id).returncode == 0
    following.wait(120)
    reading.join(120)
    for index in range(4):
        mine = [line.split("| ")[1].strip() for line in lines if line.startswith(f"rollout/{index} ")]
        assert mine == [f"{index}-{number}" for number in range(1, 201)]


def test_a_submit_and_a_fork_whose_connection_breaks_are_done_once(away: Away) -> None:
    before = {run["run_id"] for run in away.told("big", "status")["runs"]}
    runs = away.cluster.user_home / ".slurmfork" / "runs"
    submitting = away.start("submit", "--cluster", "big", "--json", str(away.spec(SPEC)))
    wait_until(lambda: {entry.name for entry in runs.iterdir()} - before, "the run's directory")
    away.cluster.drop()
    out, err = submitting.communicate(timeout=300)
    assert submitting.returncode == 0, err
    run_id = json.loads(out)["run_id"]
    away.runs.append(run_id)
    assert {run["run_id"] for run in away.told("big", "status")["runs"]} == {*before, run_id}
    away.told("big", "wait", run_id, "--for", "ready")
    forking = away.start("fork", "--cluster", "big", "--json", run_id, "eval")
    wait_until(lambda: [path for path in (runs / run_id / "logs").iterdir() if "eval" in path.name], "a child")
    away.cluster.drop()
    out, err = forking.communicate(timeout=300)
    assert forking.returncode == 0, err
    assert len([view for view in away.told("big", "ps", run_id)["workers"] if view["role"] == "eval"]) == 4


def test_what_it_says_to_type_next_goes_to_the_cluster(away: Away) -> None:
    done = away.on("big", "submit", str(away.spec(SPEC)))
    assert done.returncode == 0, done.stderr
    [run_id] = [run["run_id"] for run in away.told("big", "status", "last")["runs"]]
    away.runs.append(run_id)
    assert f"`slurmfork wait --cluster big {run_id} --for ready`" in done.stdout
    assert "`slurmfork status --cluster big` lists the runs" in away.on("big", "ps", "nobodys-run").stderr


def test_one_connection_and_one_command(away: Away) -> None:
    run_id = submit(away, "big")
    with away.cluster.sshd_options(LogLevel="VERBOSE"):
        for verb in (["status"], ["ps", run_id], ["logs", run_id], ["cancel", run_id]):
            log = len(away.cluster.log())
            assert away.on("big", *verb).returncode == 0
            wait_until(lambda: not away.cluster.connections(), "the connection to end")
            said = away.cluster.log()[log:]
            assert said.count("Accepted publickey") == 1
            assert said.count("Starting session: ") == 1


@pytest.mark.parametrize("options", [{"MaxSessions": 1}, {"Banner": "BANNER"}])
def test_servers_that_are_strict_or_talk(away: Away, tmp_path: Path, options: dict[str, Any]) -> None:
    if "Banner" in options:
        options = {"Banner": str(tmp_path / "banner")}
        (tmp_path / "banner").write_text("This is a private system.\n" * 20)
        tmp_path.chmod(0o755)
    with away.cluster.sshd_options(**options):
        assert away.told("big", "status")["runs"] is not None


def test_a_login_that_talks(away: Away) -> None:
    file = away.cluster.user_home / ".bashrc"
    before = file.read_text() if file.exists() else None
    file.write_text("echo welcome to this cluster; echo and to its errors >&2; cd /\n")
    try:
        said = away.on("big", "status", "--json")
        assert json.loads(said.stdout)["runs"] is not None
    finally:
        file.unlink() if before is None else file.write_text(before)


def test_an_unknown_host_key_is_one_line_and_nothing_is_sent(away: Away) -> None:
    config = Path(away.env["HOME"]) / ".ssh" / "config"
    config.write_text(f"Host *\n  UserKnownHostsFile {away.directory}/none\n" + config.read_text())
    log = len(away.cluster.log())
    done = away.on("big", "submit", str(away.spec(SPEC)))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "SHA256:" in line
    assert "slurmfork cluster trust big" in line
    assert "Accepted " not in away.cluster.log()[log:]


def test_a_mistake_costs_no_connection(away: Away) -> None:
    log = len(away.cluster.log())
    done = away.on("big", "submit", str(away.spec(SPEC.replace("command", "comand", 1))))
    assert done.returncode == 2
    assert "comand" in done.stderr
    missing = away.on("nowhere", "status")
    assert missing.returncode == 2
    assert "there is no cluster 'nowhere'" in missing.stderr
    assert "Connection from" not in away.cluster.log()[log:]


def test_what_the_profile_says_of_slurm_is_taken_where_the_spec_says_nothing(away: Away) -> None:
    config = Path(away.env["SLURMFORK_CONFIG"])
    config.write_text(
        PROFILES.replace('host = "login"\n', 'host = "login"\n[clusters.big.slurm]\ncomment = "ours"\ntime = 3\n')
    )
    script = away.on("big", "render", str(away.spec(SPEC))).stdout
    assert "#SBATCH --comment=ours" in script
    assert "#SBATCH --time=10" in script
    assert f"{away.cluster.user_home}/.slurmfork/" in script


# --- what goes wrong on the way


@contextmanager
def every_third_is_dropped(host: str, port: int) -> Iterator[tuple[int, list[int]]]:
    """A port that leads to another one, but drops every third connection; and how many it has taken."""
    taken: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    near, _ = listening.accept()
                    taken.append(len(taken))
                    if len(taken) % 3 == 0:
                        near.close()
                        continue
                    far = socket.create_connection((host, port))
                    for one, other in ((near, far), (far, near)):
                        threading.Thread(target=pump, args=(one, other), daemon=True).start()

        serving = threading.Thread(target=serve, daemon=True)
        serving.start()
        yield listening.getsockname()[1], taken
        listening.shutdown(socket.SHUT_RDWR)
        serving.join(30)


def pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65_536):
            other.sendall(data)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def test_a_server_that_drops_every_third_connection(away: Away) -> None:
    login = away.cluster.hosts["login"]
    key = next(line for line in away.cluster.known_hosts.read_text().splitlines() if login["address"] in line)
    known = away.directory / "known"
    known.write_text(f"third {key.partition(' ')[2]}\n")
    with every_third_is_dropped(login["address"], login["port"]) as (port, taken):
        config = Path(away.env["HOME"]) / ".ssh" / "config"
        config.write_text(
            f"Host third\n  HostName 127.0.0.1\n  Port {port}\n  HostKeyAlias third\n  UserKnownHostsFile {known}\n"
            f"  User {away.cluster.user}\n  IdentityFile {away.cluster.keys['ed25519']}\n{config.read_text()}"
        )
        file = Path(away.env["SLURMFORK_CONFIG"])
        file.write_text(file.read_text() + '[clusters.third]\nhost = "third"\n')
        for _ in range(6):
            assert away.on("third", "status").returncode == 0
        assert len(taken) > 6


def test_an_upload_that_breaks_leaves_no_half_file(away: Away) -> None:
    code = away.directory / "a dir 'with' \"quotes\" and $HOME"
    code.mkdir()
    names = ["plain.bin", "with a space.bin", "it's.bin", 'say "so".bin', "$(touch x).bin", "ünï.bin"]
    for name in names:
        (code / name).write_bytes(os.urandom(3_000_000))
    role = "roles:\n  a: {command: [sleep, '1000']}\n"
    spec = f"name: broken\ncode: {json.dumps(code.name)}\nslurm: {{time: 10}}\n{role}"
    submitting = away.start("submit", "--cluster", "big", "--json", str(away.spec(spec)))
    store = away.cluster.user_home / ".slurmfork" / "runs"
    before = {path for path in store.glob(".code-*/*/*")}
    for more in (1, 3):
        wait_until(lambda more=more: len({*store.glob(".code-*/*/*")} - before) >= more, "files to arrive")
        away.cluster.drop()
    out, err = submitting.communicate(timeout=300)
    assert submitting.returncode == 0, err
    run_id = json.loads(out)["run_id"]
    away.runs.append(run_id)
    arrived = store / run_id / "code"
    assert sorted(path.name for path in arrived.iterdir()) == sorted(names)
    for name in names:
        assert (arrived / name).read_bytes() == (code / name).read_bytes()


# --- the truth about nodes


def test_probes_from_afar_say_what_lives(away: Away) -> None:
    """By ssh from the login node to each node; agent, head and a worker are killed."""
    run_id = submit(away, "big")
    away.told("big", "wait", run_id, "--for", "ready")
    probed = away.told("big", "ps", run_id, "--probe", "--via", "ssh")["probe"]
    assert {view["verdict"] for view in probed["workers"]} == {"alive"}
    assert [node["ok"] for node in probed["nodes"]] == [True, True]
    assert probed["differences"] == []
    head = json.loads((away.cluster.user_home / ".slurmfork" / "runs" / run_id / "head.json").read_text())
    status = away.told("big", "status", run_id)["runs"][0]
    keepers = [view["agent_pid"] for view in status["nodes"]]
    for pid in [head["pid"], *keepers]:
        os.kill(pid, signal.SIGSTOP)  # so that nobody cleans up before we have looked
    victim = probed["workers"][0]
    os.kill(victim["pid"], signal.SIGKILL)
    try:
        probed = away.told("big", "ps", run_id, "--probe", "--via", "ssh")["probe"]
        verdicts = {view["worker"]: view["verdict"] for view in probed["workers"]}
        assert verdicts.pop(victim["worker"]) == "gone"
        assert set(verdicts.values()) == {"alive"}
    finally:
        for pid in [head["pid"], *keepers]:
            os.kill(pid, signal.SIGCONT)
