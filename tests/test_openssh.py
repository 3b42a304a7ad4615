"""SSH over a connection that the user shares: only ever that one; against a real server and a real ssh."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Servers, Sshd, await_true
from test_ssh import MEGABYTE, echo  # noqa: F401

from slurmfork.errors import ConnectionLost, NotReached, TransportError
from slurmfork.remote.openssh import OpenSshTransport
from slurmfork.remote.transport import run


class Shared:
    """A server, and how the user's ssh shares a connection to it."""

    def __init__(self, server: Sshd, client: Path) -> None:
        self.server = server
        self.directory = Path(tempfile.mkdtemp(prefix="sfm-"))  # a socket's path is short
        self.path = self.directory / "master"
        self.config = client / "config"
        self.config.write_text(
            f"Host it\n  HostName 127.0.0.1\n  Port {server.port}\n  User {server.login}\n"
            f"  IdentityFile {client}/id_ed25519\n  UserKnownHostsFile {client}/known_hosts\n"
            f"  ControlPath {self.path}\n"
        )
        self.options = ["-F", str(self.config)]  # ssh knows no other home than the system's

    def open(self) -> None:
        subprocess.run(["ssh", "-fNM", *self.options, "it"], check=True, timeout=30, stdin=subprocess.DEVNULL)

    def shut(self) -> None:
        subprocess.run(["ssh", "-O", "exit", *self.options, "it"], capture_output=True, timeout=30, check=False)
        await_true(lambda: not self.path.exists())

    def transport(self) -> OpenSshTransport:
        return OpenSshTransport("it", options=self.options)

    def logins(self) -> int:
        return self.server.log.read_text().count("Accepted publickey")

    def connections(self) -> int:
        return self.server.log.read_text().count("Connection from")


@pytest.fixture
def shared(sshd: Servers, client: Path) -> Iterator[Shared]:
    made = Shared(sshd(), client)
    yield made
    if made.path.is_socket():
        made.directory.chmod(0o700)
        made.path.chmod(0o600)
        made.shut()
    shutil.rmtree(made.directory)


@pytest.fixture
def over(shared: Shared) -> Iterator[OpenSshTransport]:
    shared.open()
    transport = shared.transport()
    yield transport
    transport.close()


def test_commands_go_over_the_shared_connection(over: OpenSshTransport, shared: Shared) -> None:
    for _ in range(2):
        done = run(over, ["sh", "-c", 'cat; echo "oh $A" >&2; exit 3'], input=b"hello", env={"A": "it's !"})
        assert done == (3, b"hello", b"oh it's !\n")
    assert run(over, ["sh", "-c", "exit 255"]).status == 255
    assert run(over, ["sh", "-c", "kill -KILL $$"]).status == 128 + signal.SIGKILL
    assert shared.connections() == 1


def test_it_stays_when_we_leave(over: OpenSshTransport, shared: Shared) -> None:
    channel = over.start(["sh", "-c", "echo on; exec cat"])
    assert channel.receive(30) == (b"on\n", b"")
    over.close()
    assert run(shared.transport(), ["echo", "still"]).output == b"still\n"
    assert shared.connections() == 1


def test_much_goes_both_ways(over: OpenSshTransport) -> None:
    data = os.urandom(MEGABYTE) * 20
    done = run(over, ["cat"], input=data, timeout=100)
    assert hashlib.sha256(done.output).digest() == hashlib.sha256(data).digest()


def test_a_connection_from_over_there(over: OpenSshTransport, echo: int, shared: Shared) -> None:  # noqa: F811
    with over.connect("127.0.0.1", echo) as link:
        link.sendall(b"ping")
        link.shutdown(socket.SHUT_WR)
        assert link.recv(100) == b"ping"
        assert link.recv(100) == b""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="refuses a connection to"):
            over.connect("127.0.0.1", probe.getsockname()[1])
    assert shared.connections() == 1


def test_none_yet(shared: Shared) -> None:
    with pytest.raises(NotReached) as caught:
        run(shared.transport(), ["true"])
    opening = f"`ssh -fNM -S {shared.path} -F {shared.config} it`"
    assert str(caught.value) == f"there is no shared connection to it yet: {opening} opens it"
    assert shared.connections() == 0


def test_the_command_that_is_told_opens_it(shared: Shared) -> None:
    transport = shared.transport()
    with pytest.raises(TransportError) as caught:
        run(transport, ["true"])
    command = str(caught.value).split("`")[1]
    subprocess.run(command, shell=True, check=True, timeout=30, stdin=subprocess.DEVNULL)
    assert run(transport, ["echo", "in"]).output == b"in\n"


def test_one_that_is_gone(shared: Shared) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(shared.path))
    shared.path.chmod(0o600)
    with pytest.raises(NotReached, match="is gone: `ssh -fNM"):
        run(shared.transport(), ["true"])
    assert shared.connections() == 0
    shared.path.unlink()


def test_one_that_goes_between_check_and_use(over: OpenSshTransport, shared: Shared) -> None:
    """ssh then would connect by itself; it is told to reach nothing."""
    assert run(over, ["true"]).status == 0
    shared.shut()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(shared.path))
    shared.path.chmod(0o600)
    with pytest.raises(ConnectionLost, match="is gone: `ssh -fNM"):
        run(over, ["true"])
    assert (shared.connections(), shared.logins()) == (1, 1)
    shared.path.unlink()
    shared.open()
    assert run(over, ["echo", "again"]).output == b"again\n"


def test_one_that_is_lost_during_a_command(over: OpenSshTransport, shared: Shared) -> None:
    channel = over.start(["sh", "-c", "echo started; exec cat"])
    assert channel.receive(30) == (b"started\n", b"")
    shared.server.cut()
    assert channel.receive(30) == (b"", b"")
    with pytest.raises(ConnectionLost, match="was lost while a command ran"):
        channel.wait(30)
    assert shared.connections() == 1


def test_a_socket_that_others_can_use(over: OpenSshTransport, shared: Shared) -> None:
    shared.path.chmod(0o666)
    with pytest.raises(TransportError, match="is not a socket of yours alone"):
        run(over, ["true"])
    shared.path.chmod(0o600)
    shared.directory.chmod(0o777)
    with pytest.raises(TransportError, match=f"others can write in {shared.directory}"):
        run(over, ["true"])


def test_a_file_in_its_place(shared: Shared) -> None:
    shared.path.write_text("")
    with pytest.raises(TransportError, match="is not a socket of yours alone"):
        run(shared.transport(), ["true"])


def test_one_session_a_connection(sshd: Servers, client: Path) -> None:
    shared = Shared(sshd("MaxSessions 1"), client)
    shared.open()
    transport = shared.transport()
    channel = transport.start(["cat"])
    with pytest.raises(TransportError, match="refuses a command over the shared connection"):
        transport.start(["true"])
    channel.send(b"x")
    assert channel.receive(30) == (b"x", b"")
    transport.close()
    assert shared.connections() == 1
    shared.shut()
    shutil.rmtree(shared.directory)
