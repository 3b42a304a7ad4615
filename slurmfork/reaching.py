"""Reaching a node: the ways to run a shell there, by this machine itself, by ssh, or by a step of the run's job.

A way is a command line whose standard input a POSIX shell reads on the node. Nobody is ever prompted, nothing is ever
forwarded, and whatever does not answer in time is ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from slurmfork import names
from slurmfork.backends.slurm_environment import environment
from slurmfork.errors import UsageError, one_line

HERE, SSH, SRUN = "here", "ssh", "srun"
VIAS = ("auto", SSH, SRUN)
END_S = 1.0  # for a command that is told to end; srun takes its step along
_SHOWN = 300
# On top of what the user's own configuration says: no prompt, one try, nothing that would stay behind.
_SSH = ["ssh", "-T", "-x", "-a", "-e", "none"]
_SSH_OPTIONS = {
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ConnectionAttempts": "1",
    "ControlMaster": "no",
    "LogLevel": "ERROR",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
}


class Way(NamedTuple):
    """One way to a node: what it is called, and the command that reads a script for the node."""

    via: str
    argv: Callable[[float], list[str]]


class Asked(NamedTuple):
    """What a command printed. ``status`` is None where it was ended because its time was up."""

    status: int | None
    output: bytes
    errors: bytes


def here() -> Way:
    """A shell on this machine."""
    return Way(HERE, lambda seconds: ["sh"])


def by_ssh(host: str, address: str = "") -> Way:
    """The system's ssh, with the user's configuration; ``address``: in place of what it makes of the name."""

    def argv(seconds: float) -> list[str]:  # its own time is up first, for it to say why
        options = {**_SSH_OPTIONS, "ConnectTimeout": str(max(1, int(seconds) - 1))}
        if address:
            options["HostName"] = address
        config = os.environ.get(names.SSH_CONFIG)
        given = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return [*_SSH, *(["-F", str(Path(config).expanduser())] if config else []), *given, "--", host, "exec sh"]

    return Way(SSH, argv)


def by_srun(step: Sequence[str]) -> Way:
    """A step of the run's job: ``step`` is the beginning of a command line that runs a command on the node."""
    return Way(SRUN, lambda seconds: [*step, "sh"])


def ways(via: str, host: str, address: str, step: Sequence[str], *, near: bool) -> list[Way]:
    """The ways to try, in order. ``near``: the node is this machine. Raises UsageError for one that there is not."""
    if via == SRUN and not step:
        raise UsageError("there is no srun to a node of a run without a Slurm job: --via ssh or auto")
    if via == SSH:
        return [by_ssh(host)]
    if via == SRUN:
        return [by_srun(step)]
    if near:
        return [here()]
    return [by_ssh(host), *([by_srun(step)] if step else [])]


def is_own_address(address: str) -> bool:
    """Whether an address is this machine's. (Containers of one machine have one boot, and each its own processes.)"""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def refusal(via: str, asked: Asked, seconds: float) -> str:
    """Why a way did not lead to an answer, in a line."""
    if asked.status is None:
        said = f"no answer within {seconds:.1f} s".replace(".0 s", " s")
    else:
        said = f"no answer, and exit status {asked.status}"
    words = one_line(asked.errors.decode(errors="replace")).removeprefix(f"{via}: ").strip()
    words = " ".join(words.split())
    if not words:
        return f"{via}: {said}"
    words = words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "..."
    return f"{via}: {words}" if asked.status is not None else f"{via}: {said} ({words})"


class Commands:
    """Runs commands to their ends, each in its time, and ends them all when told to; to be shared by threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._over = False
        self._environment = environment()

    def run(self, argv: Sequence[str], data: bytes, seconds: float) -> Asked:
        """Give ``data`` to a command and collect what it says; what it said before its time was up, too."""
        try:
            command = self._start(argv)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            words = f"{argv[0]} was not found on PATH" if missing else f"cannot run {argv[0]}: {error.strerror}"
            return Asked(127, b"", words.encode())
        try:
            output, errors = command.communicate(data, timeout=seconds)
            return Asked(command.returncode, output, errors)
        except subprocess.TimeoutExpired:
            return Asked(None, *_end(command))
        finally:
            with self._lock:
                self._running.discard(command)

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._over:
                raise InterruptedError(0, "interrupted")
            command = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # without the terminal nobody can be asked for a password on it
            )
            self._running.add(command)
            return command

    def end(self) -> None:
        """End what runs, and start nothing more."""
        with self._lock:
            self._over = True
            for command in self._running:
                _signal(command, signal.SIGTERM)


def _end(command: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """End a command whose time is up; returns what it has printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(command, number)
        with suppress(subprocess.TimeoutExpired):
            return command.communicate(timeout=END_S)
    for stream in (command.stdin, command.stdout, command.stderr):  # held open by what has left its session
        if stream is not None:
            with suppress(OSError):
                stream.close()
    command.wait()
    return b"", b""


def _signal(command: subprocess.Popen[bytes], number: int) -> None:
    if command.returncode is None:  # not reaped, so the group's number is its own
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(command.pid, number)
