"""Real SSH for tests: clusters that `scripts/minicluster up --ssh` starts, with users and keys of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from cluster import MiniCluster, options, outside_of_slurm
from processes import wait_until


class SshCluster(MiniCluster):
    """A MiniCluster with SSH: ssh("login", "squeue"), and what a test does to its sshd.

    Names that ssh() knows: `login`, `login-via-jump`, `jump`, each node's; `login-KEY` for each of `keys`,
    `login-password` and `login-locked`.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.hosts: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, Path] = {}
        self.config = self.known_hosts = self.user_home = Path()
        self.user = self.password_user = self.locked_user = ""
        self.password = self.passphrase = ""

    def up(self, **shape: Any) -> SshCluster:
        super().up(ssh=True, **shape)
        told = self.status()["ssh"]
        self.hosts = {host["name"]: host for host in told["hosts"]}
        self.keys = {name: Path(path) for name, path in told["keys"].items()}
        self.config, self.known_hosts = Path(told["config"]), Path(told["known_hosts"])
        self.user, self.password_user, self.locked_user = told["users"].values()
        self.password, self.passphrase = (Path(path).read_text().strip() for path in told["secrets"].values())
        self.user_home = Path(told["homes"]) / self.user
        return self

    def ssh_argv(self, host: str, *words: str) -> list[str]:
        return ["ssh", "-F", str(self.config), *words, host]

    def ssh(
        self, host: str, command: str, *words: str, typed: str | None = None, limit_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """The system's ssh, without a terminal; `typed` is its answer to whatever it is asked."""
        env = {k: v for k, v in outside_of_slurm().items() if not k.startswith(("SSH_", "SLURM"))}
        with contextlib.ExitStack() as stack:
            if typed is not None:
                env |= stack.enter_context(asked(self.home, typed))
            return self._run([*self.ssh_argv(host, *words), command], env=env, limit_s=limit_s)

    def log(self, host: str = "login") -> str:
        return (self.home / "log" / f"{self.hosts[host]['daemon']}.err").read_text(errors="replace")

    def sshd(self, host: str = "login") -> int:
        """The pid of the one that listens: SIGSTOP makes a server that accepts and never answers."""
        title = self.hosts[host]["daemon"]
        pid: int = next(daemon["pid"] for daemon in self.status()["daemons"] if daemon["name"] == title)
        return pid

    def connections(self, host: str = "login") -> list[int]:
        """One pid for each connection that is open now."""
        return children(self.sshd(host))

    def drop(self, host: str = "login") -> int:
        """Breaks every open connection, and returns how many; the sshd lives to take new ones, and so do commands."""
        pids = self.connections(host)
        for pid in pids:
            of_sshd = [child for child in children(pid) if executable(child).startswith("sshd")]
            for each in (pid, *of_sshd):  # the second, which has no rights, holds the connection too
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each, signal.SIGKILL)
        return len(pids)

    @contextlib.contextmanager
    def sshd_options(self, host: str = "login", **values: Any) -> Iterator[None]:
        """Restarts a host's sshd with other options, by its pid and for a while: sshd_options(MaxSessions=1)."""
        file = self.home / "ssh" / "hosts" / host / "sshd_config"
        before = file.read_text()
        try:
            self._configure(host, file, "".join(f"{key} {value}\n" for key, value in values.items()) + before)
            yield
        finally:
            self._configure(host, file, before)

    def _configure(self, host: str, file: Path, text: str) -> None:
        file.write_text(text)
        checked = self._run(["/usr/sbin/sshd", "-t", "-f", str(file)], env=outside_of_slurm(), limit_s=30)
        assert checked.returncode == 0, checked.stderr
        listening = self.log(host).count("Server listening on")
        os.kill(self.sshd(host), signal.SIGHUP)
        wait_until(lambda: self.log(host).count("Server listening on") > listening, f"sshd of {host} to listen again")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def executable(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


@contextlib.contextmanager
def asked(directory: Path, answer: str) -> Iterator[dict[str, str]]:
    """The environment in which ssh takes its answers from a program, not a terminal."""
    program = directory / f"askpass-{os.getpid()}"
    program.touch(mode=0o700)
    program.write_text('#!/bin/sh\necho "$SLURMFORK_TEST_ANSWER"\n')
    try:
        yield {"SSH_ASKPASS": str(program), "SSH_ASKPASS_REQUIRE": "force", "SLURMFORK_TEST_ANSWER": answer}
    finally:
        program.unlink()


class SshFactory(Protocol):
    def __call__(self, **shape: Any) -> SshCluster: ...


@pytest.fixture(scope="session")
def ssh_cluster() -> Iterator[SshFactory]:
    """ssh_cluster(nodes=2): as `minicluster` does, one cluster for each shape, shared all session long."""
    made: dict[tuple[str, ...], SshCluster] = {}

    def get(**shape: Any) -> SshCluster:
        key = tuple(options(dict(sorted(shape.items()))))
        if key not in made:
            made[key] = SshCluster().up(**shape)
        return made[key]

    yield get
    for cluster in made.values():
        cluster.down()
