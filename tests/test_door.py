"""The door: verbs run through it do what they do here, once, however often the connection is lost.

The way to it is this machine's own; a lost connection is the door's process killed, by SIGKILL.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from processes import PATIENCE, wait_until
from running import Shell

from slurmfork.errors import ConnectionLost, NotOpened, NotReached, TransportError
from slurmfork.remote.frames import MAGIC, Frame, Hello, Kind, Request, Terminal, Unpacker, pack
from slurmfork.remote.local import LocalTransport, ProcessChannel
from slurmfork.remote.visit import Ear, NotThere, Show, Visit

SPEC = """
name: door
backend: local
roles:
  a:
    replicas: 2
    command: [sh, -c, "for i in $(seq 300); do echo $SLURMFORK_INDEX-$i; sleep 0.01; done; sleep 1000"]
  child:
    autostart: false
    strategy: {type: colocation, target: a}
    command: [sleep, "1000"]
"""


class Cut(ProcessChannel):
    """A channel that is cut, and the door with it, after so many bytes of output; ``on_request``: as soon as asked."""

    after = 1 << 60
    on_request = False

    def send(self, data: bytes) -> None:
        super().send(data)
        if self.on_request and data[:1] == Kind.REQUEST.value:
            self._cut()

    def receive(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        out, err = super().receive(timeout)
        self.after -= len(out)
        if self.after < 0:
            self._cut()
        return out, err

    def _cut(self) -> None:
        self._process.kill()
        self._process.wait()
        raise ConnectionLost("cut")


@dataclass
class Way(LocalTransport):
    """A way to the door that is cut some times: each number is the bytes after which, -1 the moment it is asked."""

    home: Path
    cuts: list[int] = field(default_factory=list)
    env: Mapping[str, str] = field(default_factory=dict)
    opened: int = 0
    name: str = "there"
    away: bool = False
    channel: ProcessChannel | None = None  # the latest

    def __post_init__(self) -> None:
        super().__init__(self.name)

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> ProcessChannel:
        if self.away:
            raise NotReached("no route to there")
        channel = super().start(argv, env={**self.env, "HOME": str(self.home)})
        self.channel = channel
        self.opened += 1
        if self.cuts:
            channel.__class__ = Cut
            after = self.cuts.pop(0)
            channel.after, channel.on_request = (1 << 60, True) if after < 0 else (after, False)  # type: ignore[attr-defined]
        return channel


@dataclass
class Visitor:
    """Verbs through the door, and what was shown."""

    way: Way
    out: bytes = b""
    err: bytes = b""
    said: list[str] = field(default_factory=list)
    python: str = sys.executable

    def hear(self, data: bytes) -> None:
        self.out += data

    def hear_errors(self, data: bytes) -> None:
        self.err += data

    def visit(self, *args: str, once: bool = False, show: Show = Show.AT_ONCE, **more: object) -> Visit:
        request = Request(request_id=uuid.uuid4().hex, args=list(args), once=once)
        for name, value in more.items():
            setattr(request, name, value)
        ear = Ear(self.hear, self.hear_errors, self.said.append)
        return Visit(lambda: self.way, [self.python], request, ear, show=show)

    def __call__(self, *args: str, **more: object) -> int:
        self.out = self.err = b""
        return self.visit(*args, **more).run()  # type: ignore[arg-type]

    def submit(self, local: Shell, spec: Path, **more: object) -> str:
        """Submit through the door; the run's id."""
        files = {"spec.yaml": spec.read_bytes()}
        assert self("submit", "--json", "spec.yaml", once=True, files=files, paths=[2], **more) == 0, self.err
        run_id: str = json.loads(self.out)["run_id"]
        local.runs.append(run_id)
        return run_id


@pytest.fixture
def visitor(local: Shell, tmp_path: Path) -> Visitor:
    home = tmp_path / "home"
    home.mkdir()
    return Visitor(Way(home, env={"SLURMFORK_ROOT": str(local.root)}))


@pytest.fixture
def spec(local: Shell) -> Path:
    return local.spec(SPEC)


def spools(visitor: Visitor) -> list[str]:
    home = visitor.way.home / ".slurmfork" / "door"
    return sorted(entry.name for entry in home.iterdir()) if home.exists() else []


def test_a_verb_there_is_the_verb_here(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = visitor.submit(local, spec)
    assert visitor("wait", run_id, "--for", "ready") == 0
    assert visitor("ps", run_id, "--json") == 0
    assert json.loads(visitor.out)["workers"] == local.ps(run_id)
    assert visitor("status", "nobody") == 1
    assert visitor.err.decode() == local.call("status", "nobody").stderr
    assert visitor("frok") == 2
    assert visitor("cancel", run_id, "--json", once=True) == 0
    assert json.loads(visitor.out)["survivors"] == 0
    wait_until(lambda: spools(visitor) == [], "what was kept for a repeat to go")


@pytest.mark.parametrize("cuts", [[-1], [200], [-1, -1, 200]], ids=["asked", "answered", "thrice"])
def test_a_submit_is_done_once(local: Shell, visitor: Visitor, spec: Path, cuts: list[int]) -> None:
    lost = len(cuts)
    visitor.way.cuts = cuts
    run_id = visitor.submit(local, spec)
    assert visitor.way.opened == lost + 1
    assert len(visitor.said) == lost
    assert [run["run_id"] for run in local.json("status")["runs"]] == [run_id]


def test_a_fork_is_done_once(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visitor.way.cuts = [-1, 300]
    assert visitor("fork", run_id, "child", "--json", once=True) == 0
    assert len(json.loads(visitor.out)["workers"]) == 2
    assert sorted(view["worker"] for view in local.ps(run_id) if view["role"] == "child") == ["child/0", "child/1"]


def expected(index: int) -> list[str]:
    return [f"{index}-{number}" for number in range(1, 301)]


def test_a_log_that_is_followed_through_cuts_has_each_line_once(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visitor.way.cuts = [700, 900, 500, 1500]
    visit = visitor.visit("logs", run_id, "-f", show=Show.AT_MARKS)
    following = threading.Thread(target=visit.run)
    following.start()
    wait_until(lambda: b"0-300\n" in visitor.out and b"1-300\n" in visitor.out, "all lines")
    local.call("cancel", run_id)
    following.join(PATIENCE)
    lines = visitor.out.decode().splitlines()
    assert visitor.way.opened > 2
    for index in (0, 1):
        mine = [line.partition(" | ")[2] for line in lines if line.startswith(f"a/{index} ")]
        assert mine == expected(index)


def test_one_log_that_is_followed_through_cuts_is_what_it_is(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visitor.way.cuts = [700, 900, 500]
    visit = visitor.visit("logs", run_id, "a/1", "-f", show=Show.AT_MARKS)
    following = threading.Thread(target=visit.run)
    following.start()
    wait_until(lambda: b"1-300\n" in visitor.out, "all lines")
    local.call("cancel", run_id)
    following.join(PATIENCE)
    assert (visitor.way.opened, visitor.err) == (4, b"")
    assert visitor.out.decode().split() == expected(1)


def test_a_document_is_whole_or_not_there(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visitor.way.cuts = [500, 900]
    assert visitor("ps", run_id, "--json", show=Show.AT_END) == 0
    assert json.loads(visitor.out)["workers"] == local.ps(run_id)


def test_an_interrupt_reaches_the_verb(local: Shell, visitor: Visitor, spec: Path) -> None:
    visit = visitor.visit(
        "run", "-b", "local", "spec.yaml", once=True, files={"spec.yaml": spec.read_bytes()}, paths=[3]
    )
    status: list[int] = []
    running = threading.Thread(target=lambda: status.append(visit.run()))
    running.start()
    wait_until(lambda: b"0-5\n" in visitor.out, "the run to write")
    visit.interrupt(signal.SIGINT)
    running.join(PATIENCE)
    assert status == [130]
    assert b"cancelled, 0 survivors" in visitor.err
    assert [run["state"] for run in local.json("status")["runs"]] == ["cancelled"]


def test_what_was_killed_over_there_is_told(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visit = visitor.visit("wait", run_id, once=True)
    status: list[int] = []
    running = threading.Thread(target=lambda: status.append(visit.run()))
    running.start()
    wait_until(lambda: [name for name in spools(visitor) if (place(visitor, name) / "pid").exists()], "the errand")
    os.kill(int((place(visitor, spools(visitor)[0]) / "pid").read_text()), signal.SIGKILL)
    running.join(PATIENCE)
    assert status == [137]
    assert visitor.err == b"slurmfork: `wait` was killed over there: it is not known how much of it was done\n"


def test_a_look_that_was_killed_is_told(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    channel = visitor.way.start([sys.executable, "-I", "-m", "slurmfork.remote.door"])
    channel.send(
        pack(Kind.REQUEST, msgspec.msgpack.encode(Request(request_id=uuid.uuid4().hex, args=["wait", run_id])))
    )
    door = channel._process.pid
    children = Path(f"/proc/{door}/task/{door}/children")
    wait_until(lambda: children.read_text().split(), "the errand")
    os.kill(int(children.read_text()), signal.SIGKILL)
    unpacker = Unpacker(greeted=True)
    told: list[Frame] = []
    while not told or told[-1].kind is not Kind.EXIT:
        told += unpacker.feed(channel.receive(PATIENCE)[0])
    assert [frame.data for frame in told if frame.kind is Kind.ERRORS] == [
        b"slurmfork: `wait` was ended over there by signal 9\n"
    ]
    channel.close()


def test_an_errand_whose_door_died_before_it_began_is_begun(local: Shell, visitor: Visitor, spec: Path) -> None:
    request_id = uuid.uuid4().hex
    before = place(visitor, request_id)
    (before / "files").mkdir(parents=True, mode=0o700)
    (before / "host").write_text(socket.gethostname())
    (before / "files" / "spec.yaml").write_text("cut o")
    for directory in (before.parent, before.parent.parent):
        directory.chmod(0o700)
    visitor.submit(local, spec, request_id=request_id)


def test_a_client_that_is_lost_takes_nothing_from_another(local: Shell, visitor: Visitor, spec: Path) -> None:
    request = Request(
        request_id=uuid.uuid4().hex,
        args=["run", "-b", "local", "spec.yaml"],
        once=True,
        files={"spec.yaml": spec.read_bytes()},
        paths=[3],
    )
    first, second = (visitor.way.start([sys.executable, "-I", "-m", "slurmfork.remote.door"]) for _ in range(2))
    for channel in (first, second):  # as where the first one's end is not heard of over there before the second comes
        channel.send(pack(Kind.REQUEST, msgspec.msgpack.encode(request)))
        unpacker, heard = Unpacker(greeted=True), b""
        while b"0-5\n" not in heard:
            heard += b"".join(frame.data for frame in unpacker.feed(channel.receive(PATIENCE)[0]))
    local.runs += [run["run_id"] for run in local.json("status")["runs"]]
    first.end_input()
    assert first._process.wait(PATIENCE) == 0
    second.send(pack(Kind.SIGNAL, b"2"))
    while second.receive(PATIENCE) != (b"", b""):
        second.end_input()
    second.close()


def test_a_home_that_cannot_be_written_to(visitor: Visitor) -> None:
    (visitor.way.home / ".slurmfork").write_text("")
    assert visitor("status") == 0
    assert visitor("cancel", "nobody", once=True) == 1
    (line,) = visitor.err.decode().splitlines()
    assert line.startswith("slurmfork: `cancel` cannot begin on ")
    assert str(visitor.way.home) in line
    assert (visitor.way.opened, visitor.said) == (2, [])


def place(visitor: Visitor, name: str) -> Path:
    return visitor.way.home / ".slurmfork" / "door" / name


def test_a_look_ends_with_its_door(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    channel = visitor.way.start([sys.executable, "-I", "-m", "slurmfork.remote.door"])
    request = Request(request_id=uuid.uuid4().hex, args=["wait", run_id])
    channel.send(pack(Kind.REQUEST, msgspec.msgpack.encode(request)))
    door = channel._process.pid
    children = Path(f"/proc/{door}/task/{door}/children")
    wait_until(lambda: children.read_text().split(), "the errand")
    (errand,) = children.read_text().split()
    os.kill(door, signal.SIGKILL)
    channel._process.wait()
    wait_until(lambda: not Path(f"/proc/{errand}").exists(), "the errand to end")
    channel.close()


def test_secrets_go_into_their_file_alone(local: Shell, visitor: Visitor) -> None:
    spec = local.spec(SPEC + "secrets: [DOOR_TOKEN]\n")
    secret = uuid.uuid4().hex
    args = ["submit", "--json", "-b", "local", "spec.yaml"]
    status = visitor(
        *args, once=True, files={"spec.yaml": spec.read_bytes()}, paths=[4], secrets={"DOOR_TOKEN": secret}
    )
    assert status == 0, visitor.err
    run_id = json.loads(visitor.out)["run_id"]
    local.runs.append(run_id)
    local.json("wait", run_id, "--for", "ready")
    with_it = [
        str(path.relative_to(local.root))
        for path in local.root.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]
    assert with_it == [f"{run_id}/credentials/secrets.json"]
    assert not [path for path in visitor.way.home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("plain", [False, True])
def test_no_colour_here_is_no_colour_there(local: Shell, visitor: Visitor, spec: Path, plain: bool) -> None:
    run_id = local.ready(spec, "--backend", "local")
    terminal = Terminal(columns=80, lines=24, out=True, err=True, name="xterm", plain=plain)
    wait_until(lambda: visitor("logs", run_id, terminal=terminal) == 0 and visitor.out, "a line")
    assert visitor.out.startswith(b"a/" if plain else b"\x1b[")


# --- what stands in the way


@pytest.mark.parametrize("shell", ["sh", "bash", "tcsh", "csh", "fish"])
def test_what_a_login_shell_has_on_its_path(tmp_path: Path, shell: str) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(mode=0o755)
    (tmp_path / ".profile").write_text(
        f"echo Welcome\nexport PATH={tmp_path}/bin:$PATH SLURMFORK_CLUSTER=other A_SITE=b\nsleep 300 & echo $! >~/pid\n"
    )
    of_csh = f"setenv PATH {tmp_path}/bin:$PATH\nsetenv SLURMFORK_CLUSTER other\nsetenv A_SITE b\n"
    (tmp_path / ".login").write_text(of_csh)
    (tmp_path / ".config" / "fish").mkdir(parents=True)
    (tmp_path / ".config" / "fish" / "config.fish").write_text(
        f"status is-login; and set -gx PATH {tmp_path}/bin $PATH; set -gx SLURMFORK_CLUSTER other; set -gx A_SITE b"
    )
    code = (
        "import os; from slurmfork.remote import door; door.LOGIN_S = 3.0; door.settle();"
        "print(os.environ['PATH'].split(':')[0], os.environ.get('SLURMFORK_CLUSTER'), os.environ.get('A_SITE'))"
    )
    (tmp_path / "none").mkdir()
    env = {"HOME": str(tmp_path), "SHELL": program, "PATH": str(tmp_path / "none")}
    for name in ("env", "sleep"):
        (tmp_path / "none" / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=PATIENCE, check=True)
    assert done.stdout.decode().split() == [f"{tmp_path}/bin", "None", "b"]
    if (tmp_path / "pid").exists():
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_what_a_login_shell_says_first_is_passed_over(visitor: Visitor) -> None:
    unpacker = Unpacker(greeted=True)
    hello = pack(Kind.HELLO, b"{}")
    stream = b"Welcome!\nlast login: never\n" + MAGIC + hello
    frames = [frame for at in range(len(stream)) for frame in unpacker.feed(stream[at : at + 1])]
    assert [frame.kind for frame in frames] == [Kind.HELLO]
    assert unpacker.noise.startswith(b"Welcome!")
    with pytest.raises(TransportError, match="without an end"):
        list(Unpacker(greeted=True).feed(b"yes\n" * 400_000))


def test_no_slurmfork_over_there_is_said(visitor: Visitor, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True, timeout=PATIENCE)
    visitor.python = str(bare / "bin" / "python")
    with pytest.raises(NotThere, match="slurmfork is not there"):
        visitor("status")


def test_a_version_is_looked_at_before_anything_is_asked(local: Shell, visitor: Visitor, spec: Path) -> None:
    def refuse(hello: Hello) -> None:
        raise TransportError(f"not with {hello.version}")

    visit = visitor.visit("submit", str(spec), once=True)
    visit._check = refuse
    with pytest.raises(TransportError, match="not with"):
        visit.run()
    assert not local.root.exists()


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "x" * 300])
def test_a_file_goes_nowhere_else(visitor: Visitor, name: str) -> None:
    assert visitor("status", files={name: b"x"}) == 2
    assert b"is no name for a file" in visitor.err
    assert [path.name for path in visitor.way.home.iterdir()] == [".slurmfork"]


@pytest.mark.parametrize("request_id", ["../../x", "short", "", "a" * 100])
def test_a_request_id_is_one(visitor: Visitor, request_id: str) -> None:
    assert visitor("submit", once=True, request_id=request_id) == 2
    assert b"is no request id" in visitor.err


def test_without_a_connection_nothing_is_repeated(visitor: Visitor) -> None:
    class Closed(Way):
        def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> ProcessChannel:
            self.opened += 1
            raise NotOpened("nobody there")

    visitor.way = Closed(visitor.way.home)
    with pytest.raises(TransportError, match="nobody there"):
        visitor("submit", once=True)
    assert visitor.way.opened == 1


def drop(visitor: Visitor) -> None:
    """What a lost connection is to a door."""
    assert visitor.way.channel is not None
    visitor.way.channel._process.kill()


@pytest.fixture
def waiting(local: Shell, visitor: Visitor, spec: Path) -> Iterator[tuple[Visit, list[object]]]:
    """A `wait` over there that is under way, as a verb that is done once; and how it ended."""
    run_id = local.ready(spec, "--backend", "local")
    visit = visitor.visit("wait", run_id, once=True)
    ended: list[object] = []

    def work() -> None:
        try:
            ended.append(visit.run())
        except (TransportError, KeyboardInterrupt) as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: visit._channel, "the request to be asked")
    yield visit, ended
    visitor.way.away = False
    local.call("cancel", run_id)
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_connection_may_be_lost_again_and_again(
    visitor: Visitor, waiting: tuple[Visit, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmfork.remote.visit.PATIENCE_S", 1.5)
    monkeypatch.setattr("slurmfork.remote.visit.STOOD_S", 0.5)
    visit, ended = waiting
    for _ in range(3):
        time.sleep(2.0)  # a time in which nothing is said
        drop(visitor)
        wait_until(lambda: visitor.said, "the loss")
        wait_until(lambda: ended or visit._channel, "another connection")
        visitor.said.clear()
        assert ended == []


def test_a_network_that_is_away_comes_back(visitor: Visitor, waiting: tuple[Visit, list[object]]) -> None:
    visit, ended = waiting
    visitor.way.away = True
    drop(visitor)
    wait_until(lambda: ended or "no route to there; trying again" in visitor.said, "a try")
    visitor.way.away = False
    wait_until(lambda: ended or visit._channel, "the connection")
    assert ended == []


def test_a_door_that_waits_leaves_the_disk_in_peace(visitor: Visitor, waiting: tuple[Visit, list[object]]) -> None:
    def reads() -> int:
        assert visitor.way.channel is not None
        words = Path(f"/proc/{visitor.way.channel._process.pid}/io").read_text().split()
        return int(words[words.index("syscr:") + 1])

    time.sleep(5.0)
    before = reads()
    time.sleep(2.0)
    assert 0 < reads() - before < 120


def test_one_that_stays_away_is_told_with_what_goes_on(
    visitor: Visitor, waiting: tuple[Visit, list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slurmfork.remote.visit.PATIENCE_S", 1.0)
    visitor.way.away = True
    drop(visitor)
    wait_until(lambda: waiting[1], "the end of patience")
    assert str(waiting[1][0]) == "no route to there, and does not come back; what was asked goes on over there"


def test_a_signal_waits_for_the_connection(visitor: Visitor, waiting: tuple[Visit, list[object]]) -> None:
    visit, ended = waiting
    assert visit.under_way
    visitor.way.away = True
    drop(visitor)
    wait_until(lambda: visit._channel is None, "the loss")
    assert visit.interrupt(signal.SIGINT) is False
    visitor.way.away = False
    wait_until(lambda: ended, "the end")
    assert ended == [130]
    assert b"slurmfork: interrupted" in visitor.err


def test_what_only_looks_does_not_come_back_for_a_signal(local: Shell, visitor: Visitor, spec: Path) -> None:
    run_id = local.ready(spec, "--backend", "local")
    visit = visitor.visit("wait", run_id)
    ended: list[BaseException] = []

    def work() -> None:
        try:
            visit.run()
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    wait_until(lambda: visit._channel, "the request to be asked")
    visitor.way.away = True
    drop(visitor)
    wait_until(lambda: visitor.said, "the loss")
    assert not visit.under_way
    visit.interrupt(signal.SIGINT)
    thread.join(PATIENCE)
    assert [type(error) for error in ended] == [KeyboardInterrupt]


def test_a_connection_that_is_lost_before_anything_was_asked_is_made_again(visitor: Visitor) -> None:
    visitor.way.cuts = [10, 10]
    assert visitor("status") == 0
    assert visitor.way.opened == 3
    visitor.way.cuts = [10] * 9
    with pytest.raises(ConnectionLost, match="cut"):
        visitor("status")
    assert visitor.way.opened == 6
