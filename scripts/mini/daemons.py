"""Starts a cluster's daemons, one after the other, each when what it needs is there."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mini.clients import command, daemon_env, node_states
from mini.inside import chrooted, furnish, separate, unbind, write_commands, write_foreign_commands
from mini.kernels import boot, furnish_kernels, lay_network, members
from mini.privsep import need_privsep
from mini.processes import look, mark_namespace
from mini.sites import foreign_commands
from mini.slurm_conf import cluster_name, write_conf, write_files
from mini.ssh_files import write_ssh_files
from mini.store import save
from mini.words import Cluster, Failed, Place, Record

AT_ONCE = 16  # how many slurmd may be starting at the same time


class Start:
    """One `up` under way: starts daemons, writes down each, and notices when one of them ends."""

    def __init__(self, cluster: Cluster, record: Record) -> None:
        self.cluster, self.record, self.shape, self.place = cluster, record, record.shape, Place(record.block)
        self.deadline = time.monotonic() + 90 + self.shape.nodes + 120 * self.shape.rooted
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def daemon(self, title: str, *argv: str) -> None:
        log = self.cluster.home / "log" / f"{title}.err"
        with log.open("ab") as out:
            child = subprocess.Popen(
                chrooted(self.cluster, self.shape, argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd="/",
                env=daemon_env(self.cluster),
                start_new_session=True,
            )
        self.adopt(title, child)

    def adopt(self, title: str, child: subprocess.Popen[bytes]) -> None:
        self.children[title] = child
        if process := look(child.pid):
            self.record.daemons[title] = process
            save(self.cluster, self.record)

    def wait(self, what: str, done: Callable[[], bool], *, titles: Iterable[str]) -> None:
        """Polls until done; a daemon that ended, or the deadline, is a failure that shows its log."""
        titles, pause = list(titles), 0.02
        while not done():
            if ended := [title for title, child in self.children.items() if child.poll() is not None]:
                status = self.children[ended[0]].returncode
                raise Failed(f"{ended[0]} ended with status {status}\n{self.tail(ended[0])}")
            if time.monotonic() > self.deadline:
                raise Failed(f"{what} in vain\n" + "\n".join(map(self.tail, titles[:3])))
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def wait_port(self, title: str, port: int) -> None:
        self.wait(f"waited for port {port} of {title}", partial(listens, port), titles=[title])

    def tail(self, title: str) -> str:
        try:
            lines = (self.cluster.home / "log" / f"{title}.err").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        return "\n".join(f"  {title}: {line}" for line in lines[-8:]) or f"  {title}: said nothing"

    def run(self) -> None:
        write_files(self.cluster, self.shape, self.place)
        if self.shape.rooted:
            separate(network=self.shape.kernels)
            mark_namespace(self.cluster)
            furnish(self.cluster, self.shape)
            write_commands(self.cluster, self.record)
        elif release := foreign_commands(self.shape):
            write_foreign_commands(self.cluster, release)
        if self.shape.kernels:
            self.kernels()
            return
        self.munged()
        if self.shape.accounting:
            self.database()
            self.slurmdbd()
        self.daemon("slurmctld", "slurmctld", "-D", "-f", str(self.cluster.conf))
        self.wait_port("slurmctld", self.place.slurmctld)
        self.slurmds()
        if self.shape.ssh:
            self.sshds()

    def kernels(self) -> None:
        """All at once: who needs the controller waits for it."""
        furnish_kernels(self.cluster, self.shape)
        write_conf(self.cluster, self.shape, self.place, self.cluster.root / "etc" / "slurm")
        unbind(self.cluster)
        lay_network(self.cluster, self.shape)
        titles = members(self.cluster, self.shape)
        for title in titles:
            self.adopt(title, boot(self.cluster, title, self.shape.gpus, []))
        self.wait("waited for all nodes to be idle", self.all_idle, titles=titles)

    def munged(self) -> None:
        at = self.cluster.home / "munge"
        self.daemon(
            "munged",
            "munged",
            "--foreground",
            f"--socket={at}/socket",
            f"--key-file={at}/key",
            f"--pid-file={at}/pid",
            f"--seed-file={at}/seed",
            f"--log-file={at}/log",
        )
        self.wait("waited for munged", (at / "socket").exists, titles=["munged"])

    def database(self) -> None:
        """A MariaDB of its own, on a Unix socket only; root of the machine is its root."""
        data, options = f"--datadir={self.cluster.home}/db", ["--no-defaults", "--user=root"]
        command("mariadb-install-db", *options, data, "--skip-test-db", env=daemon_env(self.cluster))
        self.daemon(
            "mariadbd",
            "mariadbd",
            *options,
            data,
            "--skip-networking",
            f"--socket={self.cluster.home}/db/sock",
            f"--pid-file={self.cluster.home}/run/mariadbd.pid",
            "--innodb-buffer-pool-size=32M",
            "--innodb-lock-wait-timeout=900",
        )
        self.wait("waited for mariadbd", (self.cluster.home / "db" / "sock").exists, titles=["mariadbd"])

    def slurmdbd(self) -> None:
        self.daemon("slurmdbd", "slurmdbd", "-D")  # finds its file beside SLURM_CONF
        self.wait_port("slurmdbd", self.place.slurmdbd)
        name, env = cluster_name(self.cluster), daemon_env(self.cluster)
        command("sacctmgr", "-i", "-Q", "add", "cluster", name, env=env)

    def slurmds(self) -> None:
        titles = self.cluster.nodes(self.shape)
        for first in range(0, len(titles), AT_ONCE):
            group = titles[first : first + AT_ONCE]
            for title in group:
                self.daemon(title, "slurmd", "-D", "-N", title, "-f", str(self.cluster.conf))
            for offset, title in enumerate(group, first + 1):
                port, address = self.place.slurmd(offset), self.place.address(offset)
                self.wait(f"waited for {title}", partial(listens, port, address), titles=[title])
        self.wait("waited for all nodes to be idle", self.all_idle, titles=["slurmctld", *titles[:2]])

    def sshds(self) -> None:
        """Each from its own file; a probe of the port would be a failed login in its log, so the log tells."""
        need_privsep(self.cluster)
        program = shutil.which("sshd") or "sshd"  # it starts itself again for each connection, by its full path
        for host in write_ssh_files(self.cluster, self.shape, self.place):
            self.daemon(host.title, program, "-D", "-e", "-f", str(host.config))
            log = self.cluster.home / "log" / f"{host.title}.err"
            self.wait(f"waited for {host.title}", partial(says, log, "Server listening on"), titles=[host.title])

    def all_idle(self) -> bool:
        states = node_states(self.cluster)
        return len(states) == self.shape.nodes and set(states.values()) == {"idle"}


def listens(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True


def says(log: Path, words: str) -> bool:
    return words in log.read_text(errors="replace")
