"""Nodes that are kernels of their own: User-Mode Linux, in a network that is the keeper's alone.

Each has one link to this machine's side of that network, which passes packets between them. So a node can be cut off
from all others and still be looked at from here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from mini.clients import command, daemon_env
from mini.roots import MODULES, tool
from mini.sites import site_environment
from mini.words import Cluster, Failed, Process, Record, Shape

LOGIN = "login"  # the controller is the login node, too
NETWORK = "10.80.0."
HERE = f"{NETWORK}254"
INIT = Path(__file__).resolve().parent / "node-init"
MEMORY = {LOGIN: "512M"}  # Python, sbatch and the controller; others have less
TMP_SIZE = "96M"
LINUX = "linux"  # how the name of the kernel's executable begins


def members(cluster: Cluster, shape: Shape) -> list[str]:
    return [LOGIN, *cluster.nodes(shape)]


def address(node: str) -> str:
    return f"{NETWORK}{number(node)}"


def number(node: str) -> int:
    return 250 if node == LOGIN else int(node.removeprefix("n"))


def tap(node: str) -> str:
    return f"tap{number(node)}"


def lay_network(cluster: Cluster, shape: Shape) -> None:
    """In the network namespace of this process: a link to each node, and packets passed on between them."""
    tool(["ip", "link", "set", "lo", "up"])
    for node in members(cluster, shape):
        tool(["ip", "tuntap", "add", tap(node), "mode", "tap"])
        tool(["ip", "address", "add", f"{HERE}/32", "dev", tap(node)])
        tool(["ip", "link", "set", tap(node), "up"])
        tool(["ip", "route", "add", f"{address(node)}/32", "dev", tap(node)])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def furnish_kernels(cluster: Cluster, shape: Shape) -> None:
    """What the kernels find in the root: their init, the one module that it needs, names, keys."""
    root = cluster.root
    module = next(MODULES.rglob("overlay.ko"), None)
    if not module:
        raise Failed(f"no overlay.ko below {MODULES}; the package user-mode-linux has it", 3)
    shutil.copy(module, root / "sbin" / "overlay.ko")
    shutil.copy(INIT, root / "sbin" / "node-init")
    (root / "sbin" / "node-init").chmod(0o755)
    (root / "shared").mkdir()
    cluster.shared.mkdir(mode=0o755)
    (cluster.home / "uml").mkdir(mode=0o700)
    names = [f"{address(node)} {node}" for node in members(cluster, shape)]
    (root / "etc" / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names]) + "\n")
    (root / "etc" / "resolv.conf").write_text("")
    munge = root / "etc" / "munge" / "munge.key"
    munge.unlink(missing_ok=True)
    munge.touch(mode=0o400)
    munge.write_bytes(os.urandom(128))
    tool(["chroot", str(root), "chown", "munge:munge", "/etc/munge/munge.key"])
    write_ssh(cluster, shape)


def write_ssh(cluster: Cluster, shape: Shape) -> None:
    """One key for all sshd of this cluster, and one for us; nobody else is on that network."""
    at, root = cluster.home / "ssh", cluster.root
    at.mkdir(mode=0o700)
    for name in ("host", "user"):
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(at / name), env=dict(os.environ))
    for old in (root / "etc" / "ssh").glob("ssh_host_*"):
        old.unlink()
    shutil.copy(at / "host", root / "etc" / "ssh" / "ssh_host_ed25519_key")
    (root / "root" / ".ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(at / "user.pub", root / "root" / ".ssh" / "authorized_keys")
    lines = ["UsePAM no", "UseDNS no", "PrintMotd no", "MaxStartups 100", "HostKey /etc/ssh/ssh_host_ed25519_key"]
    lines += [f"SetEnv {name}={value}" for name, value in site_environment(shape).items()]
    (root / "etc" / "ssh" / "sshd_config").write_text("\n".join(lines) + "\n")
    (at / "known_hosts").write_text(f"node {' '.join((at / 'host.pub').read_text().split()[:2])}\n")
    words = ["Host *", "User root", f"IdentityFile {at}/user", "IdentitiesOnly yes", "HostKeyAlias node"]
    words += [f"UserKnownHostsFile {at}/known_hosts", "GlobalKnownHostsFile /dev/null", "StrictHostKeyChecking yes"]
    words += ["ConnectTimeout 30", "ServerAliveInterval 20", "ServerAliveCountMax 3", "LogLevel ERROR"]
    # a handshake is seconds of work for such a kernel
    words += ["ControlMaster auto", f"ControlPath {at}/%h", "ControlPersist 120"]
    (at / "config").write_text("\n".join(words) + "\n")


def boot(cluster: Cluster, node: str, gpus: int, namespaces: list[str]) -> subprocess.Popen[bytes]:
    """Starts a node's kernel; `namespaces` is what comes before the command, if this process is not in them."""
    words = [
        shutil.which("linux.uml") or "linux.uml",
        f"mem={MEMORY.get(node, '256M')}",
        "root=/dev/root",
        "rootfstype=hostfs",
        f"rootflags={cluster.root}",
        "ro",
        "init=/sbin/node-init",
        f"vec0:transport=tap,ifname={tap(node)},depth=64,gro=1",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
        "quiet",
        f"uml_dir={cluster.home}/uml/",
        f"umid={node}",
        f"bed={cluster.home}",  # so that each process of it tells whose it is
        f"node={node}",
        f"address={address(node)}",
        f"gateway={HERE}",
        f"gpus={gpus}",
        f"tmp={TMP_SIZE}",
    ]
    with (cluster.home / "log" / f"{node}.err").open("ab") as out:
        return subprocess.Popen(
            [*namespaces, *words],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd="/",
            env=daemon_env(cluster),
            start_new_session=True,
        )


def reach(cluster: Cluster, keeper: Process | None, node: str, argv: list[str]) -> list[str]:
    """The command that runs another one on a node."""
    if not keeper:
        raise Failed(f"{cluster.name} is not up")
    there = ["nsenter", f"--net=/proc/{keeper.pid}/ns/net", "--"]
    return [*there, "ssh", "-F", f"{cluster.home}/ssh/config", address(node), "--", shlex.join(argv)]


def forget_connection(cluster: Cluster, node: str) -> None:
    """The one that is kept open for the next command there."""
    argv = ["ssh", "-F", f"{cluster.home}/ssh/config", "-O", "exit", address(node)]
    subprocess.run(argv, capture_output=True, timeout=30, check=False)


def on_node(cluster: Cluster, record: Record, node: str, *argv: str, limit_s: float = 60) -> str:
    return command(*reach(cluster, record.keeper, node, list(argv)), env=daemon_env(cluster), limit_s=limit_s)
