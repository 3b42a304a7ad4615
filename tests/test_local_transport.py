"""This machine as a transport: the same as over SSH, without it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator

import psutil
import pytest
from test_ssh import MEGABYTE, echo  # noqa: F401

from slurmfork.errors import ConnectionLost, TransportError
from slurmfork.remote.local import LocalTransport
from slurmfork.remote.transport import run


@pytest.fixture
def here() -> Iterator[LocalTransport]:
    before = psutil.Process().children()  # of other tests' sessions, perhaps
    transport = LocalTransport()
    yield transport
    transport.close()
    assert [child for child in psutil.Process().children() if child not in before] == []


def test_a_command_has_output_errors_and_status(here: LocalTransport) -> None:
    done = run(here, ["sh", "-c", 'cat; echo "oh $A" >&2; exit 3'], input=b"hello", env={"A": "b c"})
    assert done == (3, b"hello", b"oh b c\n")
    assert run(here, ["sh", "-c", "kill -TERM $$"]).status == 128 + signal.SIGTERM
    with pytest.raises(TransportError, match="cannot start 'no-such-command'"):
        here.start(["no-such-command"])


def test_much_goes_both_ways(here: LocalTransport) -> None:
    data = os.urandom(MEGABYTE) * 20
    assert run(here, ["cat"], input=data).output == data


def test_input_that_is_not_read_any_more(here: LocalTransport) -> None:
    channel = here.start(["sh", "-c", "exec <&-; echo shut; sleep 1000"])
    assert channel.receive(30) == (b"shut\n", b"")
    with pytest.raises(BrokenPipeError):
        channel.send(b"x" * MEGABYTE)


def test_waiting_ends_in_time(here: LocalTransport) -> None:
    channel = here.start(["sleep", "1000"])
    with pytest.raises(TimeoutError):
        channel.receive(0.1)
    with pytest.raises(TimeoutError):
        channel.wait(0.1)
    with pytest.raises(TimeoutError):
        run(here, ["sleep", "1000"], timeout=0.2)


def test_closing_ends_who_waits(here: LocalTransport) -> None:
    """One that does not read, and does not heed SIGHUP, either."""
    channel = here.start(["sh", "-c", "trap '' HUP; echo ready; sleep 1000"])
    assert channel.receive(30) == (b"ready\n", b"")
    ends: list[BaseException] = []

    def sends() -> None:
        try:
            channel.send(b"x" * MEGABYTE)
        except BrokenPipeError as error:
            ends.append(error)

    def receives() -> None:
        try:
            channel.receive()
        except ConnectionLost as error:
            ends.append(error)

    threads = [threading.Thread(target=work) for work in (sends, receives)]
    for thread in threads:
        thread.start()
    channel.close()
    for thread in threads:
        thread.join(30)
    assert len(ends) == 2
    here.close()


def test_connections(here: LocalTransport, echo: int) -> None:  # noqa: F811
    with here.connect("127.0.0.1", echo) as link:
        link.sendall(b"x")
        assert link.recv(1) == b"x"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="cannot connect from this machine"):
            here.connect("127.0.0.1", probe.getsockname()[1])
