"""SSH by the system's `ssh`, over a connection that the user has opened: for logins that ask for a code each time.

Reuse only. Never a prompt, never a connection of our own: where the shared connection is gone, `ssh` would make a new
one, so it is told to reach the host by `false`, which reaches nothing. What ssh itself has to say comes by a pipe of
its own, apart from what the command writes, and tells a command's exit status from ssh's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurmfork.errors import ConnectionLost, NotOpened, NotReached, TransportError, one_line
from slurmfork.remote.local import ProcessChannel, popen
from slurmfork.remote.quoting import command_line

OPENING_S = 15.0
_LONGEST = 85  # bytes of a control path: ssh adds 17 while it makes one, and a socket's path has 107
_OPENED = "master session id"
_STATUS = re.compile(r"Received exit status from master (\d+)")
_SAY_STATUS = ["sh", "-c", '"$@"; exit $?', "sh"]  # or a command that a signal ends looks like a lost connection


class _Words:
    """What an ssh process says of itself, as it comes, by a FIFO that only this user can reach."""

    def __init__(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="slurmfork-ssh-")
        self.path = os.path.join(self._directory, "log")  # noqa: PTH118 (a word of a command)
        os.mkfifo(self.path, 0o600)
        self._reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self._reader, True)
        self._holder = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)  # or it would look ended until ssh opens it
        self._changed = threading.Condition()
        self._text = ""
        self._ended = False
        threading.Thread(target=self._collect, name="slurmfork-ssh-words", daemon=True).start()

    def _collect(self) -> None:
        with open(self._reader, "rb", buffering=0) as stream:
            while data := stream.read(65536):
                with self._changed:
                    self._text += data.decode(errors="replace")
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        shutil.rmtree(self._directory, ignore_errors=True)

    def end_with(self, process: subprocess.Popen[bytes] | None) -> None:
        """The words end when this process does."""

        def wait() -> None:
            if process is not None:
                process.wait()
            os.close(self._holder)

        threading.Thread(target=wait, name="slurmfork-ssh-end", daemon=True).start()

    def wait_for(self, text: str, timeout: float) -> bool:
        """Whether ssh says this before it ends; raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in self._text or self._ended, timeout):
                raise TimeoutError
            return text in self._text

    def all(self, timeout: float) -> str:
        """All that it said; raises TimeoutError where it still speaks."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError
            return self._text


class MuxChannel(ProcessChannel):
    """A command over a shared connection. That this was lost is told by ``wait``, after the end of the output."""

    def __init__(self, process: subprocess.Popen[bytes], words: _Words, name: str) -> None:
        super().__init__(process)
        self._words = words
        self._name = name

    def wait(self, timeout: float | None = None) -> int:
        super().wait(timeout)
        found = _STATUS.search(self._words.all(OPENING_S))
        if found is None:
            raise ConnectionLost(f"the shared connection to {self._name} was lost while a command ran there")
        return int(found[1])


class OpenSshTransport:
    """A machine reached over a connection that the user shares. ``options`` say how `ssh` would reach it."""

    def __init__(self, host: str, *, name: str | None = None, options: Sequence[str] = ()) -> None:
        self.name = name or host
        self._host = host
        self._options = list(options)
        self._path: Path | None = None
        self._channels: list[MuxChannel] = []
        self._tunnels: list[subprocess.Popen[bytes]] = []

    def start(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> MuxChannel:
        command = os.fsdecode(command_line([*_SAY_STATUS, *argv], env))
        self._channels = [channel for channel in self._channels if not channel.over]
        process, words = self._spawn(["--", self._host, command])
        channel = MuxChannel(process, words, self.name)
        try:
            self._await_opened(words, "a command")
        except BaseException:
            channel.end()
            raise
        self._channels.append(channel)
        return channel

    def connect(self, host: str, port: int, timeout: float = 10.0) -> socket.socket:
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._tunnels = [tunnel for tunnel in self._tunnels if tunnel.poll() is None]
        ours, theirs = socket.socketpair()
        with theirs:
            tunnel, words = self._spawn(["-W", target, "--", self._host], theirs)
        try:
            self._await_opened(words, f"a connection to {target}", timeout)
        except BaseException:
            ours.close()
            tunnel.kill()
            tunnel.wait()
            raise
        self._tunnels.append(tunnel)
        return ours

    def close(self) -> None:
        """Ends what we began; the shared connection is the user's, and stays."""
        while self._channels:
            self._channels.pop().end()
        while self._tunnels:
            tunnel = self._tunnels.pop()
            tunnel.kill()
            tunnel.wait()

    # --- ssh

    def _spawn(self, rest: list[str], stream: socket.socket | None = None) -> tuple[subprocess.Popen[bytes], _Words]:
        """An ssh with pipes, or with its input and output on a socket; and what it says."""
        reusing = self._reusing()
        words = _Words()
        command = [*reusing, "-T", "-E", words.path, *rest]
        process = None
        try:
            if stream is None:
                process = popen(command)
            else:
                end = stream.fileno()
                process = subprocess.Popen(
                    command, stdin=end, stdout=end, stderr=subprocess.DEVNULL, start_new_session=True
                )
        except OSError as error:
            raise TransportError(f"cannot start ssh: {error.strerror}; install OpenSSH's client") from error
        finally:
            words.end_with(process)
        return process, words

    def _reusing(self) -> list[str]:
        """ssh with the options by which it uses the shared connection, or none."""
        settings = [
            f"ControlPath={self._control_path()}",
            "ControlMaster=no",
            "BatchMode=yes",
            "ProxyJump=none",
            "ProxyCommand=false",
            "ProxyUseFdpass=no",
            "PermitLocalCommand=no",
            "ClearAllForwardings=yes",
            "RemoteCommand=none",
            "LogLevel=DEBUG2",
        ]
        return ["ssh", *(word for setting in settings for word in ("-o", setting)), "-a", "-x", *self._options]

    def _await_opened(self, words: _Words, what: str, timeout: float = OPENING_S) -> None:
        try:
            if words.wait_for(_OPENED, timeout):
                return
        except TimeoutError:
            raise NotOpened(
                f"the shared connection to {self.name} does not answer: {self._closing()} ends it, {self._opening()} "
                "opens another"
            ) from None
        told = words.all(OPENING_S)
        if "refused by peer" in told:
            raise TransportError(f"{self.name} refuses {what} over the shared connection: {_last(told)}")
        self._path = None
        raise NotOpened(f"the shared connection to {self.name} is gone: `{self._opening()}` opens it")

    # --- the shared connection

    def _control_path(self) -> Path:
        """Where the shared connection is, checked; raises TransportError with the command that opens it."""
        path = self._path or self._find_path()
        self._check_owner(path)
        if self._path is None:
            done = self._ask("-O", "check", "-o", f"ControlPath={path}")
            if done.returncode != 0:
                raise NotReached(f"the shared connection to {self.name} is gone: `{self._opening()}` opens it")
            self._path = path
        return path

    def _find_path(self) -> Path:
        """What ~/.ssh/config says of ControlPath, or a name of ours."""
        done = self._ask("-G")
        if done.returncode != 0:
            raise TransportError(f"ssh does not know how to reach {self.name}: {_last(done.stderr)}")
        found = re.search(r"^controlpath (.+)$", done.stdout, re.MULTILINE)
        if found is not None and found[1] != "none":
            return Path(found[1]).expanduser()
        path = Path.home() / ".ssh" / f"slurmfork-{self.name}"
        if len(os.fsencode(path)) > _LONGEST:
            raise TransportError(f"{path} is too long a name for a socket: set ControlPath in ~/.ssh/config")
        return path

    def _check_owner(self, path: Path) -> None:
        try:
            facts = path.lstat()
            around = path.parent.stat()
        except OSError:
            raise NotReached(  # who had one, and was asked for more, may open another
                f"there is no shared connection to {self.name} yet: `{self._opening(path)}` opens it"
            ) from None
        if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise TransportError(
                f"{path} is not a socket of yours alone, so it is not used: remove it, or ask who made it"
            )
        by_others = around.st_mode & 0o022 and not around.st_mode & stat.S_ISVTX
        if by_others or around.st_uid not in (0, os.geteuid()):
            raise TransportError(f"others can write in {path.parent}, so {path.name} in it is not used: chmod go-w it")

    def _ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["ssh", *words, *self._options, "--", self._host]
        try:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=OPENING_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise TransportError(f"ssh did not answer within {OPENING_S:.0f} s: {shlex.join(command)}") from None
        except OSError as error:
            raise TransportError(f"cannot start ssh: {error.strerror}; install OpenSSH's client") from error

    def _opening(self, path: Path | None = None) -> str:
        """The command that opens the shared connection."""
        with contextlib.suppress(TransportError):
            path = path or self._path or self._find_path()
        return shlex.join(["ssh", "-fNM", "-S", str(path), *self._options, self._host])

    def _closing(self) -> str:
        return shlex.join(["ssh", "-O", "exit", "-S", str(self._path), *self._options, self._host])


def _last(text: str) -> str:
    """The last line that ssh wrote as more than debugging."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("debug")]
    return one_line(lines[-1]) if lines else "it did not say why"
