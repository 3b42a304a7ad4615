"""The stage: a backend to run on, and those who must come to no harm on it: decoys, and a second run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kept import python_with_ray
from ray_cluster import RayCluster
from running import Shell

from chaos import sight, specs
from chaos.sight import Who

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
NODES, GPUS, CPUS = 4, 8, 16
RAY_NODES = 3
PATIENCE = 60.0
FOREVER = 3 * 3600
LIKE = {"SLURMFORK_RUN_ID": "chaos-aaaaaa", "SLURMFORK_NODE": "local0", "SLURMFORK_WORKER": "first/0"}
PRCTL = "import ctypes, signal; ctypes.CDLL(None).prctl(15, b'slurmfork-agent', 0, 0, 0); signal.pause()"


class Broken(Exception):
    """A trial cannot go on as planned; says why."""


def until(condition: Any, what: str, patience: float = PATIENCE, pause: float = 0.005) -> Any:
    """Wait for something true and return it; raises Broken."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise Broken(f"waited {patience:g} s in vain for {what}")
        time.sleep(pause)
    return found


@dataclass
class Innocents:
    """Processes of this user that look like a run's, and are not."""

    those: dict[Who, str] = field(default_factory=dict)
    _children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add(
        self, words: str, argv: list[str], *, cwd: Path | None = None, reads: Path | None = None, **environment: str
    ) -> Who:
        """Start one and have it looked after; ``words`` say what it is like, ``reads`` is what it has open."""
        base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        with (reads or Path(os.devnull)).open("rb") as file:
            child = subprocess.Popen(
                argv,
                env={**base, **environment},
                cwd=cwd,
                stdin=file,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._children.append(child)
        return self.note(words, child.pid)

    def note(self, words: str, pid: int) -> Who:
        """Look after a process that is there."""
        found = sight.who(pid)
        if found is None:
            raise Broken(f"an innocent is gone before anything happened: {words}")
        self.those[found] = words
        return found

    def hit(self) -> list[str]:
        """Those that are gone, or were stopped; each is told once."""
        gone = [one for one in self.those if not sight.lives(one) or sight.state(one.pid) == "T"]
        return [f"{self.those.pop(one)} (pid {one.pid})" for one in gone]

    def release(self, pids: list[int]) -> None:
        """End these, and look after them no more; all are children of ours."""
        self.those = {one: words for one, words in self.those.items() if one.pid not in pids}
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        pids.clear()

    def end(self) -> None:
        for child in self._children:
            child.kill()
            with contextlib.suppress(ChildProcessError):
                child.wait()
        self._children.clear()
        self.those.clear()


class Stage:
    """A backend, the directory for everything, and the innocents of the whole batch."""

    def __init__(
        self, directory: Path, backend: str, proctrack: str, *, engines: bool = False, isolation: str = "none"
    ) -> None:
        self.directory, self.backend, self.proctrack = directory, backend, proctrack
        self.engines = engines  # whether all runs host some
        self.isolation = isolation
        self.ray: RayCluster | None = None
        self._ray_python = ""
        self.innocents = Innocents()
        self.size = NODES
        self.conf = ""
        self.prefix = ""
        self.second: list[Who] = []
        self._cluster = f"chaos-{os.getpid()}"
        self._shell: Shell | None = None
        self._run_id = ""
        self._given_up: set[int] = set()  # raylets that were to be killed

    @contextlib.contextmanager
    def up(self) -> Iterator[Stage]:
        """Everything is there within; nothing of it is afterwards."""
        try:
            if self.backend == "slurm":
                self._bring_up()
            elif self.backend == "ray":
                self._ray_python = python_with_ray()
                self.ray = RayCluster(self._ray_python, nodes=RAY_NODES, gpus=GPUS, cpus=CPUS)
                self.size = RAY_NODES
                self.watch_ray()
            self._people()
            yield self
        finally:
            self._clear()

    def shell(self, directory: Path) -> Shell:
        """A user's shell with a root of its own."""
        directory.mkdir(parents=True, exist_ok=True)
        if self.ray is not None:
            return self.ray.shell(directory, self._ray_python)
        conf = {"SLURM_CONF": self.conf} if self.conf else {}
        return Shell(directory, {**conf, "PYTHONFAULTHANDLER": "1"})  # who is aborted says where it was

    def node(self, number: int) -> str:
        return f"{self.prefix}{number}" if self.backend == "slurm" else f"{self.backend}{number - 1}"

    # --- Ray

    def watch_ray(self) -> None:
        """What there is of the cluster must come to no harm."""
        assert self.ray is not None
        known = {one.pid for one in self.innocents.those}
        for pid in set(self.ray.raylets.values()) - known - self._given_up:
            self.innocents.note("a raylet of the cluster", pid)

    def spare_raylets(self) -> list[int]:
        """Those that neither the cluster nor the second run needs."""
        assert self.ray is not None
        assert self._shell is not None
        nodes = json.loads((self._shell.root / self._run_id / "ray.json").read_text())["nodes"]
        head, *others = self.ray.raylets
        used = {head, *(place["node_id"] for place in nodes.values())}
        return [self.ray.raylets[node] for node in others if node not in used]

    def replace_raylet(self, pid: int) -> None:
        """One is to be killed: it is nobody's to look after, and the cluster gets another node."""
        assert self.ray is not None
        self._given_up.add(pid)  # the cluster goes on naming it
        self.innocents.those = {one: words for one, words in self.innocents.those.items() if one.pid != pid}
        self.ray.add_node()
        self.watch_ray()

    # --- Slurm

    def _bring_up(self) -> None:
        # Other clusters on this machine number their jobs from 1: ours are not to be taken for theirs.
        first = f"FirstJobId={100_000 + 1000 * (os.getpid() % 60_000)}"
        shape = ["--nodes", str(NODES), "--gpus", str(GPUS), "--proctrack", self.proctrack, "--set", first]
        self._minicluster("up", *shape)
        self.conf = json.loads(self._minicluster("status", "--json"))["conf"]
        self.prefix = f"{self._cluster}-n"
        for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH", "SRUN"))]:
            del os.environ[name]
        os.environ["SLURM_CONF"] = self.conf

    def _minicluster(self, verb: str, *words: str) -> str:
        argv = [sys.executable, str(SCRIPTS / "minicluster"), verb, "--name", self._cluster, *words]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=400, check=False)
        if done.returncode:
            raise Broken(f"minicluster {verb}: {done.stderr.strip()}")
        return done.stdout

    def slurm(self, *argv: str, check: bool = True) -> str:
        """One of Slurm's commands; its output."""
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        if check and done.returncode:
            raise Broken(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def job_state(self, job_id: str) -> str:
        """RUNNING, COMPLETING ...; empty where Slurm knows no such job."""
        words = self.slurm("scontrol", "-o", "show", "job", job_id, check=False).split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "")

    def slurmd(self, node: str) -> list[Who]:
        """The daemon of a node; its steps have daemons of their own."""
        words = f"\0-N\0{node}\0-f\0{self.conf}\0".encode()
        return [one for pid in sight.pids() if words in sight.read(pid, "cmdline") and (one := sight.who(pid))]

    def start_slurmd(self, node: str) -> None:
        """Start a node's daemon again, as the cluster has it."""
        environment = {**os.environ, "SLURMFORK_MINICLUSTER_OF": str(Path(self.conf).parent)}
        subprocess.Popen(
            ["slurmd", "-N", node, "-f", self.conf],
            env={**environment, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ).wait()  # it becomes a daemon

    # --- the innocents

    def _people(self) -> None:
        place = self.directory / "decoys"
        place.mkdir()
        (place / "mark").write_bytes(bytes(4096))
        worker = specs.command("plain", place, "first/0", str(FOREVER))
        self.innocents.add("a process with a worker's command line", worker)
        self.innocents.add("a process tagged as of another run", worker, **LIKE)
        self.innocents.add("a process that is called slurmfork-agent", [sys.executable, "-c", PRCTL])
        self._start_second()

    def _start_second(self) -> None:
        """The second run, alive for the whole batch; another one if it was hit."""
        place = self.directory / f"second-{time.monotonic_ns()}"
        place.mkdir()
        (place / "mark").write_bytes(bytes(4096))
        draft = specs.Draft("chaos", place, nodes=1, isolation=self.isolation)
        if self.backend == "slurm":
            draft.slurm = {"nodelist": self.node(1), "time": "12:00:00"}
        for role, kind in (("first", "plain"), ("role0", "daemon"), ("role1", "stubborn")):
            draft.role(role, kind, stop={"grace": 0.5})
            draft.roles[role]["command"].append(str(FOREVER))
        self._shell = self.shell(self.directory / "second")
        run_id = self._run_id = self._shell.ready(self._shell.spec(draft.text()), "--backend", self.backend)
        seen = sight.Sight(place, run_id=run_id)
        until(lambda: len(seen.announced()) >= 4, "the second run's processes")
        found = seen.workers() | seen.own()
        for one in found:
            self.innocents.those[one] = f"the second run's {sight.command(one.pid)[:80]}"

    def harmed(self) -> list[str]:
        """Innocents that something happened to since the last look."""
        found = self.innocents.hit()
        if any(words.startswith("the second run's") for words in found):
            self._end_second()
            self.innocents.those = {
                one: words for one, words in self.innocents.those.items() if not words.startswith("the second run's")
            }
            self._start_second()
        return found

    def _end_second(self) -> None:
        if self._shell is not None and self._run_id:
            self._shell.call("cancel", self._run_id)

    def _clear(self) -> None:
        with contextlib.suppress(Exception):
            self._end_second()
        self.innocents.end()
        if self.backend == "slurm":
            self._minicluster("down")
        if self.ray is not None:
            self.ray.end()


def pause(seconds: float) -> None:
    """Let a random moment pass: what is waited for here is no event."""
    time.sleep(seconds)


def kill_group(child: subprocess.Popen[Any]) -> None:
    """End a command of ours that hangs."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGKILL)
    child.wait()
