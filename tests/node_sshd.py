"""A real sshd for tests, on loopback, with keys of its own, and the client's configuration for it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from cluster import demanded
from processes import wait_until

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class Sshd:
    """One sshd, for this user, and files for its clients. ``more``: lines for its configuration.

    It listens on 127.0.0.1 and on ``address``. Who logs in has a home directory of its own, ``home``: what this
    machine's user has in his .bashrc is no part of the test.
    """

    def __init__(self, directory: Path, *more: str, address: str = "127.0.0.1") -> None:
        if SSHD is None or shutil.which("ssh") is None:
            if demanded():
                pytest.fail("there is no sshd here: install openssh-server and openssh-client")
            pytest.skip("there is no sshd here (openssh-server)")
        self.directory = directory
        directory.mkdir(mode=0o700)
        for name in ("host", "user"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL)
        self.home = directory / "home"
        self.home.mkdir()
        (directory / "authorized").write_text((directory / "user.pub").read_text())
        self.port = free_port()
        lines = [
            *(f"ListenAddress {one}:{self.port}" for one in {"127.0.0.1", address}),
            f"HostKey {directory}/host",
            f"AuthorizedKeysFile {directory}/authorized",
            f"SetEnv HOME={self.home}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "PermitRootLogin prohibit-password",
            *more,
        ]
        (directory / "sshd_config").write_text("\n".join(lines) + "\n")
        self.known_hosts = directory / "known_hosts"
        key = " ".join((directory / "host.pub").read_text().split()[:2])
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port},[{address}]:{self.port} {key}\n")
        self.log = directory / "log"

    def config(self, name: str = "ssh_config", *, hosts: dict[str, str] | None = None) -> Path:
        """A client's configuration: all hosts are this sshd, but for those (pattern: lines) in ``hosts``."""
        lines = []
        for pattern, own in (hosts or {}).items():
            lines += [f"Host {pattern}", own]
        lines += [
            "Host *",
            "HostName 127.0.0.1",
            f"Port {self.port}",
            f"IdentityFile {self.directory}/user",
            "IdentitiesOnly yes",
            f"UserKnownHostsFile {self.known_hosts}",
            "GlobalKnownHostsFile none",
        ]
        path = self.directory / name
        path.write_text("\n".join(lines) + "\n")
        return path

    @contextmanager
    def running(self) -> Iterator[Sshd]:
        """It listens until the end of the block."""
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        assert SSHD is not None
        with self.log.open("wb") as log:
            argv = [SSHD, "-D", "-e", "-f", str(self.directory / "sshd_config")]
            daemon = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            wait_until(lambda: daemon.poll() is not None or accepts(self.port), "sshd to listen")
            assert daemon.poll() is None, self.log.read_text()
            yield self
        finally:
            daemon.terminate()
            daemon.wait(30)


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
        return True
    return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def silent_server() -> Iterator[int]:
    """The port of a server that takes connections and never says a word."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1024)
        yield int(sock.getsockname()[1])
