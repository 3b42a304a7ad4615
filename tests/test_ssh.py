"""SSH by paramiko, against real servers: running commands, what is carried, what is survived."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sshd import Servers, Sshd, await_true, need

from slurmfork.errors import ConnectionLost, TransportError, UsageError
from slurmfork.remote import reach
from slurmfork.remote.quoting import command_line
from slurmfork.remote.ssh import SshTransport
from slurmfork.remote.terminal import Terminal
from slurmfork.remote.transport import Transport, run

MEGABYTE = 1 << 20
AWKWARD = [
    "a b", "it's", "back\\slash", "\\\\two", "bang!x", "!!", "$HOME", "`id`", "*", "~", "{a,b}", "=x", "%1", "#c", "-n",
    "", "ü", "tab\there", '"dq"', "a\\'b", "\\n", "^x^y", "a;b|c&d<e>f(g)", "[x]?", "$(id)", "\\!", ",", "@", "!\\'",
]  # fmt: skip
ECHO = [sys.executable, "-c", "import os, sys; print(repr([os.environ['X'], *sys.argv[1:]]), end='')"]


def to(server: Sshd, **more: object) -> SshTransport:
    given: dict[str, object] = {"user": server.login, "port": server.port, "terminal": Terminal(allowed=False), **more}
    return SshTransport("127.0.0.1", **given)  # type: ignore[arg-type]


@pytest.fixture
def here(sshd: Servers) -> Iterator[SshTransport]:
    """A transport to this machine by SSH."""
    transport = to(sshd())
    yield transport
    transport.close()


def test_a_command_has_output_errors_and_status(here: SshTransport) -> None:
    done = run(here, ["sh", "-c", "cat; echo oh >&2; exit 3"], input=b"hello")
    assert done == (3, b"hello", b"oh\n")
    assert run(here, ["sh", "-c", "echo $A"], env={"A": "it's $HOME!"}).output == b"it's $HOME!\n"


def test_all_commands_share_one_connection(here: SshTransport) -> None:
    first = run(here, ["sh", "-c", "echo $SSH_CONNECTION"]).output
    assert first
    assert run(here, ["sh", "-c", "echo $SSH_CONNECTION"]).output == first


def test_a_signal_is_128_and_more(here: SshTransport) -> None:
    assert run(here, ["sh", "-c", "kill -TERM $$"]).status == 128 + signal.SIGTERM
    assert run(here, ["sh", "-c", "kill -KILL $$"]).status == 128 + signal.SIGKILL


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "csh", "fish"])
def test_words_come_through_every_shell(shell: str) -> None:
    need(*({shell} & {"csh", "fish"}))
    line = command_line([*ECHO, *AWKWARD], {"X": "a'b\\c!"})
    done = subprocess.run([shell, "-c", line], capture_output=True, timeout=30, check=False)
    assert done.stdout.decode() == repr(["a'b\\c!", *AWKWARD]), done.stderr


def test_a_line_break_is_refused() -> None:
    with pytest.raises(UsageError, match="line break"):
        command_line(["echo", "a\nb"])


@pytest.mark.parametrize("shell", ["/bin/bash", "/bin/csh", "/usr/bin/fish"])
def test_login_shells(shell: str, sshd: Servers) -> None:
    need(os.path.basename(shell)) if "bash" not in shell else None
    transport = to(sshd(), user=sshd.user(shell).name)
    try:
        done = run(transport, ["/usr/bin/printf", "%s|", *AWKWARD], env={"X": "a 'b' !c"})
        assert done.output.decode() == "".join(f"{word}|" for word in AWKWARD), done.errors
        assert run(transport, ["sh", "-c", 'echo "$X"; exit 7'], env={"X": "a 'b' !c"}) == (7, b"a 'b' !c\n", b"")
    finally:
        transport.close()


def test_a_banner_and_a_noisy_bashrc_do_no_harm(sshd: Servers, tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("Authorised use only\n")
    user = sshd.user()
    user.write(".bashrc", "echo noise; echo more >&2\n")
    transport = to(sshd(f"Banner {banner}"), user=user.name)
    try:
        done = run(transport, ["echo", "data"])
        assert done.output.endswith(b"data\n")
        assert done.status == 0
    finally:
        transport.close()


def test_much_goes_both_ways_at_once(here: SshTransport) -> None:
    data = os.urandom(MEGABYTE) * 20
    done = run(here, ["cat"], input=data, timeout=100)
    assert len(done.output) == len(data)
    assert hashlib.sha256(done.output).digest() == hashlib.sha256(data).digest()


def test_a_reader_that_waits_holds_the_writer_back(here: SshTransport) -> None:
    """100 MB, unread at first: what is kept here stays below the window, and all of it comes in the end."""
    channel = here.start(["head", "-c", str(100 * MEGABYTE), "/dev/zero"])
    before = _resident()
    channel.receive(30)
    with pytest.raises(TimeoutError):
        channel.wait(1.0)  # the command cannot end: nobody reads
    total = MEGABYTE
    while any(parts := channel.receive(60)):
        total += len(parts[0])
        assert _resident() - before < 40 * MEGABYTE
    assert total >= 100 * MEGABYTE
    assert channel.wait(10) == 0
    channel.close()


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_input_that_is_not_read_any_more(here: SshTransport) -> None:
    channel = here.start(["true"])
    assert channel.receive(30) == (b"", b"")
    assert channel.wait(30) == 0

    def send() -> None:
        for _ in range(100):  # some is taken until the server has said that it takes no more
            channel.send(b"x" * MEGABYTE)

    with pytest.raises(BrokenPipeError):
        send()
    channel.close()


def test_waiting_is_by_events(here: SshTransport) -> None:
    """What was sent in another thread is echoed; a wait without news costs next to no CPU time."""
    channel = here.start(["cat"])
    before = time.process_time()
    with pytest.raises(TimeoutError):
        channel.receive(2.0)
    assert time.process_time() - before < 0.3
    threading.Thread(target=channel.send, args=(b"ping",)).start()
    assert channel.receive(30) == (b"ping", b"")
    channel.end_input()
    channel.end_input()
    assert channel.receive(30) == (b"", b"")
    assert channel.wait(30) == 0
    channel.close()


def test_a_cut_connection_is_told_and_made_anew(sshd: Servers) -> None:
    server = sshd()
    transport = to(server)
    channel = transport.start(["sh", "-c", "echo started; exec cat"])
    assert channel.receive(30) == (b"started\n", b"")
    server.cut()
    with pytest.raises(ConnectionLost, match="was lost"):
        channel.receive(30)
    with pytest.raises(ConnectionLost):
        channel.wait(30)
    with pytest.raises(ConnectionLost):
        channel.send(b"x")
    channel.close()
    assert run(transport, ["echo", "again"]).output == b"again\n"
    transport.close()


def test_a_server_that_freezes_is_noticed(sshd: Servers) -> None:
    server = sshd()
    transport = to(server)
    wire = transport.open()
    wire.keep_alive(0.2)
    channel = transport.start(["cat"])
    for session in server.sessions():
        session.suspend()
    with pytest.raises(ConnectionLost):
        channel.receive(30)
    transport.close()


def test_a_quiet_connection_is_kept(sshd: Servers) -> None:
    transport = to(sshd())
    transport.open().keep_alive(0.1)
    channel = transport.start(["cat"])
    with pytest.raises(TimeoutError):
        channel.receive(2.0)  # twenty questions, all answered
    channel.send(b"x")
    assert channel.receive(30) == (b"x", b"")
    transport.close()


def test_closing_ends_a_wait(here: SshTransport) -> None:
    channel = here.start(["cat"])
    threading.Timer(0.2, here.close).start()
    with pytest.raises(ConnectionLost):
        channel.receive(30)


def test_one_session_a_connection(sshd: Servers) -> None:
    transport = to(sshd("MaxSessions 1"))
    channel = transport.start(["cat"])
    with pytest.raises(TransportError, match="allows no further command on the connection"):
        transport.start(["true"])
    channel.send(b"x")
    assert channel.receive(30) == (b"x", b"")
    channel.close()
    transport.close()


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets, and closes after the end of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link:
                while data := link.recv(65536):
                    link.sendall(data)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)


def test_a_connection_from_over_there(here: SshTransport, echo: int) -> None:
    data = os.urandom(20 * MEGABYTE)
    with here.connect("127.0.0.1", echo) as link:
        assert isinstance(link, socket.socket)
        feeding = threading.Thread(target=lambda: (link.sendall(data), link.shutdown(socket.SHUT_WR)))
        feeding.start()
        got = bytearray()
        while more := link.recv(1 << 18):
            got += more
        feeding.join(30)
    assert got == data


def test_closed_tunnels_leave_no_threads(here: SshTransport, echo: int) -> None:
    here.open()
    before = threading.active_count()
    for _ in range(3):
        with here.connect("127.0.0.1", echo) as link:
            link.sendall(b"x")
            assert link.recv(1) == b"x"
    await_true(lambda: threading.active_count() == before)


def test_no_connection_from_over_there(here: SshTransport, sshd: Servers) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(TransportError, match=f"no connection to 127.0.0.1:{free} from there"):
        here.connect("127.0.0.1", free)
    strict = to(sshd("AllowTcpForwarding no"))
    with pytest.raises(TransportError, match="forbids connections"):
        strict.connect("127.0.0.1", free)
    strict.close()


def test_by_a_jump_host(sshd: Servers, client: Path) -> None:
    jump, target = sshd(), sshd()
    transport = to(target, proxy_jump=f"{jump.login}@127.0.0.1:{jump.port}")
    assert run(transport, ["echo", "there"]).output == b"there\n"
    assert len(jump.connections()) == 1
    transport.close()
    await_true(lambda: not jump.connections() and not target.connections())


def test_by_two_jump_hosts_of_the_ssh_config(sshd: Servers, client: Path) -> None:
    first, second, target = sshd(), sshd(), sshd()
    (client / "conf.d").mkdir()
    (client / "config").write_text(f"Include conf.d/*\nHost *\n  User {sshd.login}\n  HostName 127.0.0.1\n")
    (client / "conf.d" / "hops").write_text(
        f"Host first\n  Port {first.port}\nHost second\n  Port {second.port}\n"
        f"Host target\n  Port {target.port}\n  ProxyJump first,second\n"
    )
    transport = SshTransport("target", terminal=Terminal(allowed=False))
    assert run(transport, ["echo", "there"]).output == b"there\n"
    assert [len(server.connections()) for server in (first, second)] == [1, 1]
    transport.close()


def test_by_a_proxy_command(sshd: Servers, client: Path) -> None:
    server = sshd()
    script = client / "relay.py"
    script.write_text(
        "import os, socket, sys, threading\n"
        "link = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def up():\n    while data := os.read(0, 65536): link.sendall(data)\n    os._exit(0)\n"
        "threading.Thread(target=up).start()\n"
        "while data := link.recv(65536): os.write(1, data)\n"
    )
    (client / "config").write_text(f"Host 127.0.0.1\n  ProxyCommand {sys.executable} {script} %h %p\n")
    transport = to(server)
    assert run(transport, ["echo", "there"]).output == b"there\n"
    transport.close()


def test_a_server_that_never_answers(client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "HANDSHAKE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        start = time.monotonic()
        transport = SshTransport("127.0.0.1", port=mute.getsockname()[1])
        with pytest.raises(TransportError, match="takes connections but does not answer"):
            run(transport, ["true"])
        assert time.monotonic() - start < 20


def test_a_server_that_hangs_up_at_first_is_asked_again(sshd: Servers, client: Path) -> None:
    """Before the login nothing has been done, so that it does no harm."""
    server = sshd()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    sshd.know(server.known_line().replace(f":{server.port}", f":{port}"))

    def serve() -> None:
        for _ in range(2):
            listener.accept()[0].close()
        link, _ = listener.accept()
        onward = socket.create_connection(("127.0.0.1", server.port))
        threading.Thread(target=_carry, args=(link, onward), daemon=True).start()
        _carry(onward, link)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    transport = SshTransport("127.0.0.1", port=port, user=server.login, terminal=Terminal(allowed=False))
    assert run(transport, ["echo", "in"]).output == b"in\n"
    transport.close()
    thread.join(30)
    listener.close()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_hosts_that_are_not_there(client: Path) -> None:
    with pytest.raises(TransportError, match="has no address"):
        SshTransport("no-such-host.invalid").open()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with pytest.raises(TransportError, match="Connection refused"):
            SshTransport("127.0.0.1", port=probe.getsockname()[1]).open()


def test_it_is_a_transport(here: SshTransport) -> None:
    transport: Transport = here
    assert transport.name == "127.0.0.1"
