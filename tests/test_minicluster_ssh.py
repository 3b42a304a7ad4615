"""`scripts/minicluster up --ssh` for real: who gets in and where, by the system's ssh, and that nothing is left."""

from __future__ import annotations

import grp
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import SCRIPT, UNAVAILABLE, outside_of_slurm
from processes import wait_until
from ssh_cluster import SshCluster, SshFactory

pytestmark = pytest.mark.slurm


@pytest.fixture
def cluster(ssh_cluster: SshFactory) -> SshCluster:
    return ssh_cluster(nodes=2)


@pytest.fixture
def fresh() -> Iterator[Callable[[], SshCluster]]:
    """Clusters of a test's own, for what cannot be done to a shared one."""
    made: list[SshCluster] = []

    def get() -> SshCluster:
        made.append(SshCluster())
        return made[-1]

    yield get
    for cluster in made:
        cluster.down()


def remains(home: Path, uids: set[int]) -> list[str]:
    """Processes of those users, or with the cluster's directory in their command line, environment or errors."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            words += b"\0" + os.fsencode((entry / "fd" / "2").readlink())
            uid = int((entry / "status").read_text().partition("Uid:")[2].split()[0])
        except OSError:
            continue
        if f"{home}/".encode() in words or f"={home}\0".encode() in words or uid in uids:
            found.append(f"{entry.name} of {uid}: {words[:80]!r}")
    return found


def users_of(home: Path) -> dict[str, int]:
    return {entry.pw_name: entry.pw_uid for entry in pwd.getpwall() if entry.pw_gecos.endswith(f" {home}")}


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 255, done.stdout
    assert done.stdout == ""
    return done.stderr


def test_a_user_submits_and_watches_on_the_login_node(cluster: SshCluster) -> None:
    assert ok(cluster.ssh("login", "sinfo -h -N -p gpu -o %N")).split() == cluster.nodes
    wrap = "id -un; echo $SLURM_JOB_NODELIST"
    job = ok(cluster.ssh("login", f"sbatch --parsable --wait --output=%j.out --wrap '{wrap}'")).strip()
    assert ok(cluster.ssh("login", f"cat {job}.out")).split() == [cluster.user, cluster.nodes[0]]
    held = ok(cluster.ssh("login", "sbatch --parsable --hold --wrap true")).strip()
    assert ok(cluster.ssh("login", "squeue -h --me -o '%A %u'")).split() == [held, cluster.user]
    ok(cluster.ssh("login", f"scancel {held}"))


def test_the_user_is_no_one_else_and_has_a_home_of_its_own(cluster: SshCluster) -> None:
    uid, home = ok(cluster.ssh("login", "id -u; echo $HOME")).split()
    assert Path(home) == cluster.user_home
    assert int(uid) == pwd.getpwnam(cluster.user).pw_uid != os.getuid()


def test_through_the_jump_host(cluster: SshCluster) -> None:
    before = cluster.log("jump").count("Accepted publickey")
    address = cluster.hosts["login"]["address"]
    assert ok(cluster.ssh("login-via-jump", "echo $SSH_CONNECTION")).split()[2] == address
    assert cluster.log("jump").count("Accepted publickey") == before + 1


def test_each_node_by_the_name_that_slurm_gives_it(cluster: SshCluster) -> None:
    for name in cluster.nodes:
        wanted = [cluster.hosts[name]["address"], str(cluster.hosts[name]["port"])]
        assert ok(cluster.ssh(name, "echo $SSH_CONNECTION")).split()[2:] == wanted
        onward = f"ssh -o BatchMode=yes {name} 'echo $SSH_CONNECTION'"  # as a user on the login node has it
        assert ok(cluster.ssh("login", onward)).split()[2:] == wanted


@pytest.mark.parametrize("key", ["ed25519", "ecdsa", "rsa", "certificate"])
def test_every_kind_of_key_gets_in(key: str, cluster: SshCluster) -> None:
    assert ok(cluster.ssh(f"login-{key}", "echo in")) == "in\n"


def test_a_passphrase_is_asked_for(cluster: SshCluster) -> None:
    assert ok(cluster.ssh("login-passphrase", "echo in", typed=cluster.passphrase)) == "in\n"
    assert "Permission denied" in refused(cluster.ssh("login-passphrase", "echo in", typed="wrong"))
    assert "Permission denied" in refused(cluster.ssh("login-passphrase", "echo in"))


@pytest.mark.parametrize("method", ["password", "keyboard-interactive"])
def test_a_password_is_asked_for(method: str, cluster: SshCluster) -> None:
    only = f"-oPreferredAuthentications={method}"
    assert ok(cluster.ssh("login-password", "id -un", only, typed=cluster.password)).strip() == cluster.password_user
    words = [only, "-oNumberOfPasswordPrompts=1"]
    assert "Permission denied" in refused(cluster.ssh("login-password", "id", *words, typed="wrong"))
    assert "Permission denied" in refused(cluster.ssh("login-password", "id", *words))  # and there is no terminal
    assert "(publickey)" in refused(cluster.ssh("login", "id", only, typed=cluster.password))


def test_who_must_not_get_in_does_not(cluster: SshCluster, tmp_path: Path) -> None:
    assert "Permission denied" in refused(cluster.ssh("login-unauthorised", "id"))
    assert "account has expired" in refused(cluster.ssh("login-locked", "id"))
    assert "Permission denied" in refused(cluster.ssh("login", "id", "-lroot"))
    assert "verification failed" in refused(cluster.ssh("login", "id", f"-oUserKnownHostsFile={tmp_path}/none"))
    changed, jump, login = tmp_path / "changed", cluster.hosts["jump"], cluster.hosts["login"]
    swap = (f"[{jump['address']}]:{jump['port']}", f"[{login['address']}]:{login['port']}")
    lines = [line for line in cluster.known_hosts.read_text().splitlines() if swap[0] in line]
    changed.write_text("".join(f"{line.replace(*swap)}\n" for line in lines))
    said = refused(cluster.ssh("login", "id", f"-oUserKnownHostsFile={changed}", "-oHostKeyAlgorithms=ssh-ed25519"))
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in said


def test_keys_and_secrets_are_for_who_made_the_cluster(cluster: SshCluster) -> None:
    at = cluster.keys["ed25519"].parent
    assert at.stat().st_mode & 0o777 == 0o700
    for path in at.iterdir():
        assert path.suffix == ".pub" or path.stat().st_mode & 0o777 == 0o600
    assert cluster.ssh("login", f"cat {at}/ed25519").returncode == 1


def test_env_and_status_tell_where_everything_is(cluster: SshCluster) -> None:
    shown = subprocess.run(
        ["bash", "-c", 'eval "$("$@")"; env', "bash", sys.executable, SCRIPT, "env", "--name", cluster.name],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    told = dict(line.partition("=")[::2] for line in shown.stdout.splitlines())
    login = cluster.hosts["login"]
    assert told["MINICLUSTER_SSH_CONFIG"] == str(cluster.config)
    assert told["MINICLUSTER_SSH_LOGIN"] == f"{login['address']}:{login['port']}"
    assert told["MINICLUSTER_SSH_USER"] == cluster.user
    assert told["SLURM_CONF"] == cluster.env["SLURM_CONF"]
    addresses = [(host["address"], host["port"]) for host in cluster.hosts.values()]
    assert len(set(addresses)) == 4
    assert {daemon["name"] for daemon in cluster.status()["daemons"]} >= {"sshd-login", "sshd-jump"}


@pytest.mark.parametrize("shell", ["csh", "fish"])
def test_slurm_answers_whatever_the_shell(shell: str, ssh_cluster: SshFactory, tmp_path: Path) -> None:
    cluster = ssh_cluster(nodes=1, login_shell=shell)
    assert Path(ok(cluster.ssh("login", "echo $SHELL")).strip()).name.endswith(shell)
    assert ok(cluster.ssh("login", "sinfo -h -p gpu -o %N; squeue -h")).split() == cluster.nodes
    assert ok(cluster.ssh(cluster.nodes[0], "sinfo -h -p gpu -o %N")).split() == cluster.nodes


def test_options_of_the_login_nodes_sshd(fresh: Callable[[], SshCluster], tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("For authorised use alone.\n")
    cluster = fresh().up(nodes=1, sshd_option=[f"Banner={banner}", "MaxAuthTries=1"])
    assert cluster.ssh("login", "true").stderr == banner.read_text()
    assert cluster.ssh("jump", "true").stderr == ""


def test_a_shared_clusters_sshd_takes_other_options_for_a_while(cluster: SshCluster) -> None:
    before = cluster.sshd()
    with cluster.sshd_options(PubkeyAuthentication="no"):
        assert "Permission denied" in refused(cluster.ssh("login", "true"))
    ok(cluster.ssh("login", "true"))
    assert cluster.sshd() == before
    assert cluster.status()["state"] == "up"


def test_a_broken_connection_and_a_new_one(cluster: SshCluster) -> None:
    argv = [*cluster.ssh_argv("login"), "echo ready; exec sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"ready\n"
        assert cluster.drop() == 1
        assert client.wait(timeout=60) == 255
    ok(cluster.ssh("login", "true"))


def test_a_wrong_option_says_why_and_leaves_no_user(fresh: Callable[[], SshCluster]) -> None:
    cluster = fresh()
    home = cluster.home
    done = cluster.script("up", "--no-install", "--nodes", "1", "--ssh", "--sshd-option", "NoSuchOption=1")
    if done.returncode == UNAVAILABLE:
        cluster.up(nodes=1)  # skips or fails, and says why
    assert done.returncode == 1
    assert "Bad configuration option: NoSuchOption" in done.stderr
    assert users_of(home) == {}
    assert not home.exists()


def test_options_of_ssh_without_ssh_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "up", "--sshd-option", "MaxSessions=1"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "--ssh" in done.stderr


@pytest.mark.parametrize("lost", [[], ["sshd-login", "keeper"]])
def test_down_leaves_nothing(lost: list[str], fresh: Callable[[], SshCluster]) -> None:
    cluster = fresh().up(nodes=1)
    home, users = cluster.home, users_of(cluster.home)
    assert sorted(users) == sorted([cluster.user, cluster.password_user, cluster.locked_user])
    ok(cluster.ssh("login", "sbatch --output=/dev/null --wrap 'sleep 600'"))
    ok(cluster.ssh("login", "env -i setsid -f sleep 600 >/dev/null 2>&1 </dev/null"))
    argv = [*cluster.ssh_argv("login-via-jump"), "echo ready; sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as session:
        assert session.stdout
        assert session.stdout.readline() == b"ready\n"
        pids = {daemon["name"]: daemon["pid"] for daemon in cluster.status()["daemons"]}
        pids["keeper"] = int(Path(f"/proc/{pids['munged']}/stat").read_text().rpartition(")")[2].split()[1])
        for title in lost:
            os.kill(pids[title], signal.SIGKILL)
        cluster.down()
        assert session.wait(timeout=60) == 255
    assert remains(home, set(users.values())) == []
    assert users_of(home) == {}
    assert not home.exists()
    assert not list(home.parent.glob(f".{cluster.name}*"))
    assert not list(Path("/run/sshd").glob(f".*{cluster.name}"))


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_of_an_up_that_was_ended_midway(signum: int, fresh: Callable[[], SshCluster]) -> None:
    cluster = fresh()
    home = cluster.home
    found: dict[str, int] = {}
    argv = [sys.executable, str(SCRIPT), "up", "--no-install", "--nodes", "4", "--ssh", "--name", cluster.name]
    with subprocess.Popen(argv, env=outside_of_slurm(), stdout=subprocess.DEVNULL) as start:
        wait_until(lambda: found.update(users_of(home)) or found or start.poll() is not None, "the first user")
        start.send_signal(signum)
    if start.returncode == UNAVAILABLE:
        cluster.up(nodes=4)  # skips or fails, and says why
    if signum == signal.SIGKILL:  # of the others it makes an end itself
        assert home.exists()
        cluster.down()
    assert users_of(home) == {}
    base = min(found, key=len)
    assert [entry.gr_name for entry in grp.getgrall() if entry.gr_name in (base, f"{base}-pw", f"{base}-locked")] == []
    assert remains(home, set(found.values())) == []
    assert not home.exists()


def test_up_again_keeps_keys_and_refuses_other_options(cluster: SshCluster) -> None:
    before = cluster.known_hosts.read_text()
    same = cluster.script("up", "--nodes", "2", "--ssh")
    other = cluster.script("up", "--nodes", "2", "--ssh", "--sshd-option", "MaxSessions=1")
    assert (same.returncode, other.returncode) == (0, 1)
    assert same.stdout.startswith("already up: ")
    assert cluster.known_hosts.read_text() == before
