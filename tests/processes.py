"""Real processes for tests: a yard starts them, waits until they are there, and checks that none is left."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from slurmfork import killing, names, process
from slurmfork.process import Identity

AWKWARD = Path(__file__).with_name("awkward.py")
PATIENCE = 30.0


def wait_until(condition: Callable[[], object], what: str, timeout: float = PATIENCE) -> None:
    """Poll until the condition holds; fails the test, naming what was awaited, if it never does."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain for {what}"
        time.sleep(0.005)


def freeze(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def kill_at_once(*pids: int) -> None:
    """SIGKILL of several; none of them hears of the others' death."""
    freeze(*pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def argv(kind: str, directory: Path, name: str) -> list[str]:
    """The command that becomes an awkward process."""
    return [sys.executable, "-I", "-S", str(AWKWARD), kind, str(directory), name]


class Yard:
    """A place for one test's processes: a directory where they announce themselves, and a run's tag.

    At its end all that was announced or carries the tag is killed; the test fails if any of it but
    the innocents was still running.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "yard"
        self.directory.mkdir()
        self.run_id = f"test-{secrets.token_hex(5)}"
        self.node = "n1"
        self.started: list[subprocess.Popen[bytes]] = []
        self._innocent: set[str] = set()

    @property
    def tag(self) -> dict[str, str]:
        return {names.RUN_ID: self.run_id, names.NODE: self.node}

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """This process's environment without any tag or Slurm in it, and what is given."""
        return {**{name: value for name, value in os.environ.items() if not name.startswith("SLURM")}, **env}

    def start(
        self, kind: str, name: str = "", *, env: Mapping[str, str] | None = None, user: int | None = None
    ) -> Identity:
        """Start an awkward process, tagged unless ``env`` says otherwise, and wait until it is there."""
        name = name or kind
        self.run(argv(kind, self.directory, name), env=env, user=user)
        return self.await_one(name)

    def run(
        self, command: list[str], *, env: Mapping[str, str] | None = None, user: int | None = None
    ) -> subprocess.Popen[bytes]:
        """Start any command, tagged unless ``env`` says otherwise; its stderr goes to a file of the yard."""
        with (self.directory / "stderr").open("ab") as errors:
            child = subprocess.Popen(
                command,
                env=self.environment(self.tag if env is None else env),
                stdin=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                user=user,
            )
        self.started.append(child)
        return child

    def innocent(self, name: str, **env: str) -> Identity:
        """A process that must be left alone; the yard ends it."""
        self._innocent.add(name)
        return self.start("plain", name, env=env)

    def await_one(self, name: str) -> Identity:
        """Wait for the announcement; returns who it is."""
        path = self.directory / f"{name}.pid"
        wait_until(path.exists, f"{name} to announce itself")
        return _announced(path)

    def await_all(self, wanted: Iterable[str]) -> list[Identity]:
        """Wait for several kinds under their own names, and for the fifty of ``forks``."""
        wanted = list(wanted)
        fifty = [f"forks-{number}" for number in range(50)] if "forks" in wanted else []
        return [self.await_one(name) for name in wanted + fifty]

    def errors(self) -> str:
        """What was said on stderr."""
        return (self.directory / "stderr").read_text()

    def kill(self, *those: Identity) -> None:
        """End these at once, and wait for it."""
        for one in those:
            process.send(one, signal.SIGKILL)
        assert killing.wait_gone(those, PATIENCE) == []

    def living(self) -> list[str]:
        """What still runs, innocents aside: names of what was announced, descriptions of what is tagged."""
        announced = {_announced(path): path.stem for path in self.directory.glob("*.pid")}
        left = [name for one, name in announced.items() if name not in self._innocent and process.alive(one)]
        strays = [one for one in process.tagged(self.run_id) if one not in announced]
        return left + [process.describe(one) for one in strays]

    def assert_innocents_live(self) -> None:
        for name in self._innocent:
            assert process.alive(self.await_one(name)), f"{name} was not to be touched"

    def __enter__(self) -> Yard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = self.living()
        while doomed := [*map(_announced, self.directory.glob("*.pid")), *process.tagged(self.run_id)]:
            if not any([process.send(one, signal.SIGKILL) for one in doomed]):
                break
        for child in self.started:
            child.kill()  # not reaped, so its PID is its own
            child.wait(PATIENCE)
        if kind is None:
            assert not left, f"left running: {left}"


def _announced(path: Path) -> Identity:
    pid, start_time = path.read_text().split()
    return Identity(int(pid), int(start_time), process.boot_id())
