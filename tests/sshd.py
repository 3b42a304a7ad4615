"""Real SSH servers for tests: OpenSSH's sshd on loopback ports, with keys, users and homes of their own.

Where there is no sshd, tests that want one are skipped with the reason, but fail where one is demanded, as with Slurm
(see cluster.py); as root it is then installed from the distribution's packages.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pty
import pwd
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from cluster import demanded

from slurmfork import account

LIMIT_S = 30.0
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "csh": "csh", "fish": "fish"}
_SBIN = "/usr/sbin:/sbin"
_numbers = itertools.count(1)


def need(*commands: str) -> None:
    """Have these commands here, or skip the test; where Slurm is demanded, so are they."""
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    missing = [command for command in commands if shutil.which(command, path=path) is None]
    if missing:
        said = f"not here: {', '.join(missing)}; install {' '.join(NEEDED[command] for command in missing)}"
        pytest.fail(said) if demanded() else pytest.skip(said)


def need_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make users, whose shells and passwords this test needs")


def keygen(file: Path, kind: str = "ed25519", passphrase: str = "", *options: str) -> Path:
    """A new key pair; the file of the private key."""
    size = ["-b", "2048"] if kind == "rsa" else []  # larger ones take seconds to make
    command = ["ssh-keygen", "-q", "-t", kind, *size, "-f", str(file), "-N", passphrase, "-C", file.name, *options]
    subprocess.run(command, check=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    return file


def public(file: Path) -> str:
    return Path(f"{file}.pub").read_text().strip()


class Sshd:
    """One server: ``port``, ``known_line()``, ``authorize(key)``; ``options`` are lines for its configuration."""

    def __init__(self, login: str, *options: str, host_keys: Sequence[str] = ("ed25519",)) -> None:
        self.login = login  # who is meant to log in here
        self.directory = Path(tempfile.mkdtemp(prefix="slurmfork-sshd-"))
        self.directory.chmod(0o755)
        self.host_keys = [keygen(self.directory / f"host_{kind}", kind) for kind in host_keys]
        self.authorized = self.directory / "authorized_keys"
        self.authorized.touch(mode=0o644)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.options = list(options)
        self._process: subprocess.Popen[bytes] | None = None
        self.log = self.directory / "log"

    def authorize(self, *keys: Path) -> None:
        self.authorized.write_text("\n".join(map(public, keys)) + "\n")

    def up(self) -> Sshd:
        with contextlib.suppress(PermissionError):
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd gives up its rights there
        lines = [
            *self.options,  # first: of each keyword sshd takes the first
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            *(f"HostKey {key}" for key in self.host_keys),
            f"AuthorizedKeysFile {self.authorized}",
            f"PidFile {self.directory / 'pid'}",
            "PermitRootLogin yes",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel VERBOSE",
        ]
        config = self.directory / "config"
        config.write_text("\n".join(lines) + "\n")
        program = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:{_SBIN}")
        assert program is not None
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=log
            )
        await_true(lambda: b"Server listening" in self.log.read_bytes() or self._ended())
        assert not self._ended(), self.log.read_text()
        return self

    def _ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def connections(self) -> list[psutil.Process]:
        """The processes that serve connections, one each."""
        assert self._process is not None
        return psutil.Process(self._process.pid).children()

    def sessions(self) -> list[psutil.Process]:
        """All of sshd's processes that serve connections: those with the user's rights, and those above them."""
        assert self._process is not None
        found = psutil.Process(self._process.pid).children(recursive=True)
        return [process for process in found if process.name().startswith("sshd")]

    def cut(self) -> None:
        """End all connections from this side, as a crash does."""
        for process in self.sessions():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def known_line(self, key: Path | None = None) -> str:
        kind, blob = public(key or self.host_keys[0]).split()[:2]
        return f"[127.0.0.1]:{self.port} {kind} {blob}"

    def down_and_up(self, *options: str) -> None:
        """Start anew with other options."""
        self._stop()
        self.options = list(options)
        self.log.unlink()
        self.up()

    def down(self) -> None:
        self._stop()
        shutil.rmtree(self.directory)

    def _stop(self) -> None:
        if self._process is None:
            return
        sessions = psutil.Process(self._process.pid).children(recursive=True) if not self._ended() else []
        for process in sessions:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
                process.kill()
        self._process.terminate()
        self._process.wait(LIMIT_S)
        psutil.wait_procs(sessions, LIMIT_S)


def await_true(question: object, limit_s: float = LIMIT_S) -> None:
    """Until a question is answered with yes; fails after a generous time."""
    assert callable(question)
    end = time.monotonic() + limit_s
    while not question():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


class User:
    """A throwaway account with a home, a password and a shell."""

    def __init__(self, shell: str = "/bin/bash") -> None:
        self.name = f"sft{os.getpid()}-{next(_numbers)}"
        self.password = f"secret-{os.urandom(6).hex()}"
        self._parent = Path(tempfile.mkdtemp(prefix="slurmfork-home-"))
        self._parent.chmod(0o755)
        self.home = self._parent / "home"
        command = ["useradd", "--create-home", "--home-dir", str(self.home), "--shell", shell, self.name]
        subprocess.run(command, check=True, timeout=LIMIT_S)
        subprocess.run(["chpasswd"], input=f"{self.name}:{self.password}".encode(), check=True, timeout=LIMIT_S)

    def write(self, name: str, text: str) -> None:
        file = self.home / name
        file.write_text(text)
        os.chown(file, pwd.getpwnam(self.name).pw_uid, -1)

    def lock(self) -> None:
        subprocess.run(["usermod", "--lock", "--expiredate", "1", self.name], check=True, timeout=LIMIT_S)

    def remove(self) -> None:
        uid = pwd.getpwnam(self.name).pw_uid
        await_true(lambda: not [p for p in psutil.process_iter(["uids"]) if p.info["uids"].real == uid])
        subprocess.run(["userdel", self.name], check=True, timeout=LIMIT_S)
        shutil.rmtree(self._parent)


class Agent:
    """A real ssh-agent."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "agent")
        self._process = subprocess.Popen(["ssh-agent", "-D", "-a", self.path], stdout=subprocess.DEVNULL)
        await_true(lambda: os.path.exists(self.path))

    def add(self, *keys: Path) -> None:
        env = {**os.environ, "SSH_AUTH_SOCK": self.path}
        subprocess.run(["ssh-add", "-q", *map(str, keys)], env=env, check=True, timeout=LIMIT_S)

    def down(self) -> None:
        self._process.terminate()
        self._process.wait(LIMIT_S)


def on_terminal(argv: Sequence[str], dialog: Sequence[tuple[str, str]], *, limit_s: float = 60.0) -> tuple[int, str]:
    """Run a command on a terminal of its own, answering each question once it appears; (exit status, all it wrote)."""
    child, master = pty.fork()
    if child == 0:  # pragma: no cover
        with contextlib.suppress(OSError):
            os.execvp(argv[0], list(argv))
        os._exit(127)
    seen, start, left = "", 0, list(dialog)
    end = time.monotonic() + limit_s
    try:
        while True:
            assert time.monotonic() < end, f"it still runs; so far: {seen!r}"
            if not select.select([master], [], [], 1.0)[0]:
                continue
            try:
                data = os.read(master, 65536)
            except OSError:  # its last holder has gone
                break
            if not data:
                break
            seen += data.decode(errors="replace")
            if left and left[0][0] in seen[start:]:
                start = len(seen)
                os.write(master, left.pop(0)[1].encode() + b"\n")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(master)
        _, status = os.waitpid(child, 0)
    assert not left, f"it never asked {left[0][0]!r}: {seen!r}"
    return os.waitstatus_to_exitcode(status), seen


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test's own, with a key, and no agent: the directory .ssh in it."""
    need("ssh")
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(ssh.parent))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    keygen(ssh / "id_ed25519")
    return ssh


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    need("ssh")
    with tempfile.TemporaryDirectory(prefix="sfa-") as directory:  # a socket's path is short
        made = Agent(Path(directory))
        monkeypatch.setenv("SSH_AUTH_SOCK", made.path)
        yield made
        made.down()


class Servers:
    """Makes servers and users for a test, and ends them with it."""

    def __init__(self, ssh: Path, login: str) -> None:
        self._ssh = ssh
        self.login = login
        self._users = contextlib.ExitStack()  # to be removed when no server runs anything of theirs any more
        self._ends = contextlib.ExitStack()

    def __call__(
        self, *options: str, host_keys: Sequence[str] = ("ed25519",), known: bool = True, authorized: bool = True
    ) -> Sshd:
        need("sshd")
        server = Sshd(self.login, *options, host_keys=host_keys)
        self._ends.callback(server.down)
        if authorized:
            server.authorize(self._ssh / "id_ed25519")
        if known:
            self.know(*map(server.known_line, server.host_keys))
        return server.up()

    def know(self, *lines: str) -> None:
        with (self._ssh / "known_hosts").open("a") as file:
            file.write("\n".join(lines) + "\n")

    def user(self, shell: str = "/bin/bash") -> User:
        need_root()
        made = User(shell)
        self._users.callback(made.remove)
        return made

    def end(self) -> None:
        with self._users:
            self._ends.close()


@pytest.fixture(scope="session")
def login() -> Iterator[str]:
    """Who logs in: as root a throwaway user. Tests kill sessions in the middle of anything, and what start-up files of
    a real account do then (take locks, for instance) is not to be left half done."""
    if os.getuid() != 0:
        yield account.name()
        return
    made = User()
    yield made.name
    made.remove()


@pytest.fixture
def sshd(client: Path, login: str) -> Iterator[Servers]:
    """sshd(option...) starts a server whose key this test's client knows, and which knows this client's key."""
    servers = Servers(client, login)
    yield servers
    servers.end()
