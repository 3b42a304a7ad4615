"""Profiles of clusters, and the verbs that keep them; the way to a cluster, step by step, on real servers."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sshd import Servers, Sshd, keygen, on_terminal
from test_ssh_trust import fingerprint_of, nobody_tried

from slurmfork import account, clusters
from slurmfork.clusters import Cluster
from slurmfork.errors import ConfigError
from slurmfork.remote.local import LocalTransport
from slurmfork.remote.openssh import OpenSshTransport
from slurmfork.remote.ssh import SshTransport
from slurmfork.remote.transport import run


@pytest.fixture
def config(client: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config.toml of this test's own, which is not there yet."""
    file = client.parent / ".config" / "slurmfork" / "config.toml"
    monkeypatch.delenv("SLURMFORK_CONFIG", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return file


def write(config: Path, text: str) -> None:
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(text)


def slurmfork(*arguments: str, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "slurmfork", *arguments],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,  # with no terminal to ask on
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def add(server: Sshd, *options: str) -> None:
    """A profile named it."""
    slurmfork(
        "cluster", "add", "it", "--host", "127.0.0.1", "--port", str(server.port), "--user", server.login, *options
    )


def test_where_the_file_is(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clusters.config_file() == config
    assert clusters.read() == {}
    monkeypatch.setenv("XDG_CONFIG_HOME", "/elsewhere")
    assert clusters.config_file() == Path("/elsewhere/slurmfork/config.toml")
    monkeypatch.setenv("SLURMFORK_CONFIG", "~/mine.toml")
    assert clusters.config_file() == config.parents[2] / "mine.toml"


def test_all_keys(config: Path) -> None:
    write(
        config,
        '[clusters.big]\nhost = "login"\nuser = "jo"\nport = 2222\nidentity_file = "~/.ssh/big"\nproxy_jump = "a,b"\n'
        'root = "/scratch/jo"\npython = "~/venv/bin/python"\nssh = "openssh"\n'
        '[clusters.big.slurm]\npartition = "gpu"\nexclusive = true\nnice = 5\n',
    )
    assert clusters.find("big") == Cluster(
        host="login",
        user="jo",
        port=2222,
        identity_file="~/.ssh/big",
        proxy_jump="a,b",
        root="/scratch/jo",
        python="~/venv/bin/python",
        ssh="openssh",
        slurm={"partition": "gpu", "exclusive": True, "nice": 5},
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[clusters.a", "config.toml: "),
        ("[cluster.a]", "cluster: unknown; did you mean 'clusters'?"),
        ("clusters = 3", "clusters: must be tables"),
        ("[clusters]\na = 3", "clusters.a: must be a table"),
        ("[clusters.a]\nuser = 'x'", "clusters.a.host: missing"),
        ("[clusters.a]\nhost = 'x'\nproxyjump = 3", "clusters.a.proxyjump: unknown; did you mean 'proxy_jump'?"),
        ("[clusters.a]\nhost = 'x'\nport = 'y'", "clusters.a.port: expected `int | null`, got `str`"),
        ("[clusters.a]\nhost = 'x'\nport = 70000", "clusters.a.port: 70000 is not a port"),
        ("[clusters.a]\nhost = '-oProxyCommand=x'", "clusters.a.host: '-oProxyCommand=x' is not a name for SSH"),
        ("[clusters.a]\nhost = 'x'\nproxy_jump = 'y,-z'", "clusters.a.proxy_jump: '-z' is not [user@]host[:port]"),
        ("[clusters.a]\nhost = 'x'\nssh = 'putty'", "clusters.a.ssh: invalid enum value 'putty'"),
        ("[clusters.a]\nhost = 'x'\n[clusters.a.slurm]\npartitoin = 'y'", "did you mean 'partition'?"),
        (
            "[clusters.a]\nhost = 'x'\n[clusters.a.slurm]\nnodes = 3",
            "clusters.a.slurm.nodes: use the top-level `nodes`",
        ),
        ("[clusters.'a b']\nhost = 'x'", "'a b' is not a name for a cluster"),
    ],
)
def test_mistakes_are_told_with_file_and_key(config: Path, text: str, words: str) -> None:
    write(config, text)
    with pytest.raises(ConfigError) as caught:
        clusters.read()
    assert str(caught.value).startswith(str(config))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    said = slurmfork("cluster", "list", "--json", status=2)
    assert json.loads(said.stdout)["kind"] == "config"


def test_adding_keeps_what_is_there(config: Path) -> None:
    text = '# mine\n[clusters.a] # first\nhost = "x"  # and why'
    write(config, text)
    slurmfork(
        "cluster", "add", "b", "--host", "y.example", "--port", "22", "--slurm", "partition=gpu", "--slurm", "nice=5"
    )
    assert config.read_text().startswith(text + "\n")
    expected = Cluster(host="y.example", port=22, slurm={"partition": "gpu", "nice": 5})
    assert clusters.read() == {"a": Cluster(host="x"), "b": expected}
    again = slurmfork("cluster", "add", "b", "--host", "z", status=2)
    assert f"there is a cluster 'b' already: change it in {config}" in again.stderr
    assert (
        "did you mean 'partition'?"
        in slurmfork("cluster", "add", "c", "--host", "z", "--slurm", "partiton=x", status=2).stderr
    )
    assert list(clusters.read()) == ["a", "b"]
    listed = json.loads(slurmfork("cluster", "list", "--json").stdout)
    assert [(each["name"], each["host"]) for each in listed["clusters"]] == [("a", "x"), ("b", "y.example")]
    assert re.search(r"^b +y.example:22 +paramiko$", slurmfork("cluster", "list").stdout, re.MULTILINE)


def test_an_inline_table_is_not_added_to(config: Path) -> None:
    text = 'clusters = {a = {host = "x"}}\n'
    write(config, text)
    assert str(config) in slurmfork("cluster", "add", "b", "--host", "y", status=2).stderr
    assert config.read_text() == text


def test_which_way_to_a_cluster(config: Path, client: Path) -> None:
    def way(**keys: object) -> type:
        return type(clusters.transport_of("it", Cluster(**keys)))  # type: ignore[arg-type]

    here = ["localhost", socket.gethostname(), "127.0.0.1", "127.0.1.7"]
    assert [way(host=host) for host in here] == [LocalTransport] * 4
    assert way(host="localhost", user=account.name()) is LocalTransport
    assert way(host="localhost", user="somebody") is SshTransport
    assert way(host="localhost", port=2222) is SshTransport
    assert way(host="localhost", proxy_jump="x") is SshTransport
    assert way(host="192.0.2.1") is SshTransport
    assert way(host="192.0.2.1", ssh="openssh") is OpenSshTransport
    (client / "config").write_text("Host here\n  HostName 127.0.0.1\nHost tunnel\n  HostName localhost\n  Port 2222\n")
    assert way(host="here") is LocalTransport
    assert way(host="tunnel") is SshTransport


def test_a_transport_by_its_profile(config: Path, sshd: Servers) -> None:
    add(sshd())
    transport = clusters.transport_of("it", clusters.find("it"))
    assert transport.name == "it"
    assert run(transport, ["echo", "in"]).output == b"in\n"
    transport.close()


def python_of_others() -> str:
    """A Python that whoever logs in can run; this one may be in a home that is closed to others."""
    if os.getuid() != 0:
        return sys.executable
    found = next((path for path in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(path)), None)
    if found is None:
        pytest.skip("there is no Python here that another user can run")
    return found


def steps(*arguments: str, status: int) -> dict[str, tuple[bool, str]]:
    found = json.loads(slurmfork("cluster", "test", *arguments, "--json", status=status).stdout)
    assert found["ok"] == (status == 0)
    return {check["name"]: (check["ok"], check["detail"]) for check in found["checks"]}


def test_every_step_of_the_way(config: Path, sshd: Servers) -> None:
    server = sshd()
    shutil.copytree(Path(clusters.__file__).parent, server.directory / "slurmfork")
    sbatch = server.directory / "sbatch"
    sbatch.write_text("#!/bin/sh\necho slurm 22.05.8\n")
    sbatch.chmod(0o755)
    server.down_and_up(f"SetEnv PATH={server.directory}:/usr/bin:/bin PYTHONPATH={server.directory}")
    add(server, "--python", python_of_others())
    found = steps("it", status=0)
    assert list(found) == ["address", "connection", "host key", "login", "shell", "python", "slurm", "slurmfork"]
    assert fingerprint_of(server.host_keys[0]) in found["host key"][1]
    assert found["shell"][1] == "quiet"
    assert found["slurm"][1] == "slurm 22.05.8"
    people = slurmfork("cluster", "test", "it").stdout
    assert people.count("ok ") == 8
    assert re.search(r"^ok +python +3\.", people, re.MULTILINE)


def test_what_is_missing_there(config: Path, sshd: Servers) -> None:
    user = sshd.user()
    user.write(".bashrc", "echo welcome; echo hm >&2\n")
    add(sshd(f"SetEnv PATH={user.home}:/usr/bin:/bin"))
    text = config.read_text().replace(f'"{sshd.login}"', f'"{user.name}"')
    config.write_text(text)
    found = steps("it", status=1)
    assert found["shell"] == (True, "its start-up files write: welcome; hm")
    assert found["slurmfork"] == (False, "not there yet: `slurmfork cluster bootstrap it`")
    assert found["login"][0]


def test_the_step_that_fails(config: Path, sshd: Servers, client: Path) -> None:
    server = sshd(known=False)
    add(server)
    found = steps("it", status=1)
    assert list(found) == ["address", "connection", "host key"]
    assert "is not known" in found["host key"][1]
    sshd.know(server.known_line())
    (client / "id_ed25519").unlink()
    assert list(steps("it", status=1))[-1] == "login"
    assert "did you mean 'it'?" in slurmfork("cluster", "test", "itt", status=2).stderr


def test_trust_by_fingerprint(config: Path, sshd: Servers, client: Path) -> None:
    server = sshd(known=False)
    add(server)
    right, wrong = fingerprint_of(server.host_keys[0]), "SHA256:" + "A" * 43
    assert "is not known" in slurmfork("cluster", "trust", "it", status=1).stderr
    assert f"not {wrong}: refused" in slurmfork("cluster", "trust", "it", "--fingerprint", wrong, status=1).stderr
    assert not (client / "known_hosts").exists()
    told = slurmfork("cluster", "test", "it", status=1).stdout
    command = re.search(r"`slurmfork (cluster trust .*?)`", told)
    assert command is not None
    assert command[1].split()[-1] == right
    assert f"accepted: [127.0.0.1]:{server.port}" in slurmfork(*command[1].split()).stdout
    assert nobody_tried(server)
    assert steps("it", status=1)["login"][0]
    assert "known already" in slurmfork("cluster", "trust", "it").stdout
    other = keygen(client / "other")
    (client / "known_hosts").write_text(server.known_line(other) + "\n")
    assert "another host key" in slurmfork("cluster", "trust", "it", "--fingerprint", right, status=1).stderr


def test_trust_on_a_terminal_by_a_jump_host(config: Path, sshd: Servers) -> None:
    jump, target = sshd(known=False), sshd(known=False)
    add(target, "--proxy-jump", f"{jump.login}@127.0.0.1:{jump.port}")
    command = [sys.executable, "-m", "slurmfork", "cluster", "trust", "it"]
    status, seen = on_terminal(command, [("(yes/no)", "no")])
    assert (status, "was not accepted" in seen) == (1, True)
    status, seen = on_terminal(command, [("(yes/no)", "yes"), ("(yes/no)", "yes")])
    assert status == 0, seen
    assert f"accepted: [127.0.0.1]:{jump.port}, [127.0.0.1]:{target.port}" in seen
    assert fingerprint_of(target.host_keys[0]) in seen
    assert steps("it", status=1)["login"][0]


@pytest.mark.parametrize("needed", [False, True])
def test_what_match_exec_needs_is_imported_only_for_it(tmp_path: Path, needed: bool) -> None:
    code = """
import sys
from slurmfork import clusters
user = clusters.transport_of("a", clusters.Cluster(host="there.example")).settings().user
print(user, "invoke" in sys.modules)
"""
    (tmp_path / ".ssh").mkdir()
    match = 'Match host there.example exec "true"' if needed else "Match host there.example"
    (tmp_path / ".ssh" / "config").write_text(f"{match}\n  User jo\n")
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["jo", str(needed)]
