"""The files that sshd and ssh read: for each host of a cluster, for clients, and in the users' homes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mini.clients import command
from mini.ssh_keys import TYPES, authorised, authority, key_paths, make_client_keys, make_key, public, secret_paths
from mini.users import Users, homes, make_users
from mini.words import Cluster, Place, Shape

LOGIN, JUMP = 251, 252  # the last parts of their addresses, after those of the nodes
SFTP = Path("/usr/lib/openssh/sftp-server")


@dataclass(frozen=True)
class Host:
    """One sshd: `role` is login, jump or node, `name` is what the client's ssh_config calls it."""

    role: str
    name: str
    address: str
    port: int
    at: Path

    @property
    def title(self) -> str:
        return f"sshd-{self.name}"

    @property
    def config(self) -> Path:
        return self.at / "sshd_config"

    @property
    def keys(self) -> list[Path]:
        """The login node has one of each type, as a fresh Debian has; quicker to make, the others have one."""
        return [self.at / f"ssh_host_{name}_key" for name in TYPES if self.role == "login" or name == "ed25519"]

    def known(self) -> list[str]:
        return [f"[{self.address}]:{self.port} {public(key)}" for key in self.keys]


def hosts(cluster: Cluster, shape: Shape, place: Place) -> list[Host]:
    named = [("login", "login", LOGIN), ("jump", "jump", JUMP)]
    named += [("node", name, i) for i, name in enumerate(cluster.nodes(shape), 1)]
    at = cluster.home / "ssh" / "hosts"
    return [Host(role, name, place.address(i), place.sshd(role), at / name) for role, name, i in named]


def ssh_config(cluster: Cluster) -> Path:
    return cluster.home / "ssh" / "config"


def known_hosts(cluster: Cluster) -> Path:
    return cluster.home / "ssh" / "known_hosts"


def write_ssh_files(cluster: Cluster, shape: Shape, place: Place) -> list[Host]:
    (cluster.home / "ssh").mkdir(mode=0o755)
    found, users = hosts(cluster, shape, place), Users.of(place)
    make_client_keys(cluster, users.user)
    make_users(cluster, shape, place, secret_paths(cluster)["password"].read_text().strip())
    for host in found:
        for key in host.keys:
            make_key(key, re.sub("ssh_host_(.*)_key", r"\1", key.name))
        host.config.write_text(sshd_config(cluster, shape, host, users))
    known_hosts(cluster).write_text(lines(line for host in found for line in host.known()))
    ssh_config(cluster).write_text(client_config(cluster, found, users))
    for name in (users.user, users.locked_user):
        furnish(cluster, name, [host for host in found if host.role == "node"])
    return found


def sshd_config(cluster: Cluster, shape: Shape, host: Host, users: Users) -> str:
    login = host.role == "login"
    asked = [line.partition("=") for line in shape.sshd_options if login]
    own = [f"{key.strip()} {value.strip()}" for key, _, value in asked]
    ours = [
        f"ListenAddress {host.address}:{host.port}",
        *(f"HostKey {key}" for key in host.keys),
        "PidFile none",
        "PermitRootLogin no",
        f"AllowUsers {' '.join([users.user, *([users.password_user, users.locked_user] if login else [])])}",
        "AuthorizedKeysFile .ssh/authorized_keys",
        f"TrustedUserCAKeys {authority(cluster)}.pub",
        "PasswordAuthentication no",
        "KbdInteractiveAuthentication no",
        f"UsePAM {'yes' if login else 'no'}",  # without PAM there is no keyboard-interactive
        "PrintMotd no",
        "AcceptEnv LANG LC_*",
        f"Subsystem sftp {SFTP if SFTP.exists() else 'internal-sftp'}",
        # sshd hands it to whatever shell there is, interactive or not
        *([f"SetEnv SLURM_CONF={cluster.conf}"] if host.role != "jump" else []),
        *(["PerSourcePenalties no"] if version() >= (9, 8) else []),  # tests fail to log in often, from one address
    ]
    match = [f"Match User {users.password_user}", "PasswordAuthentication yes", "KbdInteractiveAuthentication yes"]
    changed = {key.strip().lower() for key, _, _ in asked}
    kept = [line for line in ours if line.split()[0].lower() not in changed]
    return lines([*own, *kept, *(match if login else [])])


def version() -> tuple[int, ...]:
    """Of the machine's OpenSSH: (9, 2). Debian's server and client are of one version."""
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", command("sh", "-c", "ssh -V 2>&1", env=dict(os.environ)))
    return tuple(map(int, found.groups())) if found else (0,)


def client_config(cluster: Cluster, found: list[Host], users: Users) -> str:
    """`login` and `jump` directly, `login-via-jump`, each node by way of the login node; and for each other way to
    knock at the login node a name of its own, as an IdentityFile once said can only be added to."""
    keys = key_paths(cluster)
    mine = [f"User {users.user}", f"IdentityFile {keys['ed25519']}"]
    words: list[str] = []
    for host in found:
        words += entry(host.name, host, *mine, *(["ProxyJump login"] if host.role == "node" else []))
    login = found[0]
    words += entry("login-via-jump", login, *mine, "ProxyJump jump")
    for name, path in keys.items():
        words += entry(f"login-{name}", login, mine[0], f"IdentityFile {path}")
    words += entry("login-locked", login, f"User {users.locked_user}", mine[1])
    words += entry("login-password", login, f"User {users.password_user}", "PubkeyAuthentication no")
    always = [
        "IdentitiesOnly yes",
        f"UserKnownHostsFile {known_hosts(cluster)}",
        "GlobalKnownHostsFile /dev/null",
        "StrictHostKeyChecking yes",
    ]
    return lines([*words, "Host *", *(f"    {line}" for line in always)])


def entry(name: str, host: Host, *more: str) -> list[str]:
    return [f"Host {name}", *(f"    {line}" for line in (f"HostName {host.address}", f"Port {host.port}", *more))]


def furnish(cluster: Cluster, name: str, nodes: list[Host]) -> None:
    """A home from which `ssh n1` works without a question, with a key that is for this alone, as sites make it."""
    at = homes(cluster) / name / ".ssh"
    make_key(at / "id_ed25519", "ed25519")
    (at / "authorized_keys").write_text(lines([*authorised(cluster), public(at / "id_ed25519")]))
    (at / "known_hosts").write_text(lines(line for host in nodes for line in host.known()))
    (at / "config").write_text(lines(line for host in nodes for line in entry(host.name, host)))
    for path in (at, *at.iterdir()):
        shutil.chown(path, name, name)


def lines(words: Iterable[str]) -> str:
    return "".join(f"{word}\n" for word in words)
