"""One bed as a user has it: commands on its login node, eyes on each of its nodes, and life's deeds done to those."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PATIENCE_S = 240.0
SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "minicluster"
FOREVER = 90000000  # how long our processes sleep, in seconds; the number tells whose they are
Ended = subprocess.CompletedProcess[str]


def outside() -> dict[str, str]:
    """This process's environment, without what a job around it or another cluster has put there."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))}


class Broken(Exception):
    """The bed itself did not do what it should."""


class Bed:
    """A cluster of scripts/minicluster, by name.

    ``directory`` is seen by every node, and is called ``there`` on them. ``user``: who is at work on the login node,
    if not root.
    """

    def __init__(self, name: str, user: str = "") -> None:
        self.name, self.user = name, user
        status = json.loads(self._script("status", "--json").stdout)
        shape = status["shape"]
        self.release: str = status["version"]
        self.tracker: str = shape["proctrack"]
        self.site: str = shape["site"]
        self.kernels: bool = shape["kernels"]
        self.rooted = bool(shape["slurm"])
        self.nodes = [node["name"] for node in status["nodes"]]
        self.down_nodes: set[str] = set()
        if self.kernels:
            self.directory, self.there = Path(status["shared"]), "/shared"
        else:
            self.directory = Path(tempfile.mkdtemp(prefix="slurmfork-bed-"))
            self.directory.chmod(0o1777)
            self.there = str(self.directory)
        self.runs: list[str] = []
        self.measured: list[str] = []  # what the scenario that is tried has to say of its times

    # --- commands

    def command(self, argv: list[str], *, node: str = "", limit_s: float = PATIENCE_S) -> Ended:
        """Runs a command on the login node, or on a node that is a kernel of its own; whatever its exit status."""
        place = ["--node", node] if node else []
        if self.user and not node:
            place = ["--user", self.user]
        return self._script("exec", *place, "--", *argv, limit_s=limit_s)

    def slurm(self, *argv: str, check: bool = True) -> str:
        """One of Slurm's commands; its output."""
        done = self.command(list(argv))
        if check and done.returncode:
            raise Broken(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()}")
        return done.stdout

    def call(self, *arguments: str, more: Mapping[str, str] | None = None, limit_s: float = PATIENCE_S) -> Ended:
        """`slurmfork ...` on the login node, whatever its exit status."""
        return self.command([*self._slurmfork(more), *arguments], limit_s=limit_s)

    def json(self, verb: str, *arguments: str) -> Any:
        """`slurmfork ... --json` that succeeds, decoded."""
        done = self.call(verb, "--json", *arguments)
        assert done.returncode == 0, f"{verb} {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def deed(self, node: str, *words: str) -> None:
        """`minicluster node ...`."""
        done = self._script("node", node, *words)
        if done.returncode:
            raise Broken(f"node {node} {' '.join(words)}: {done.stderr.strip()}")
        if words[0] == "kill":
            self.down_nodes.add(node)
        if words[0] == "start":
            self.down_nodes.discard(node)

    def on(self, node: str, line: str, *, check: bool = True) -> bool:
        """A shell line on a node; whether it ended well."""
        done = self.command(["sh", "-c", line], node=node)
        if check and done.returncode:
            raise Broken(f"{line} on {node}: {done.stderr.strip()}")
        return done.returncode == 0

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`slurmfork ...`, left running."""
        argv = [sys.executable, str(SCRIPT), "exec", "--name", self.name, "--", *self._slurmfork(), *arguments]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(argv, env=outside(), stdin=quiet, stdout=quiet, stderr=quiet, text=True)

    def _slurmfork(self, more: Mapping[str, str] | None = None) -> list[str]:
        program = ["slurmfork"] if self.rooted else [sys.executable, "-m", "slurmfork"]
        variables = {"SLURMFORK_ROOT": f"{self.there}/runs", "COLUMNS": "200", **(more or {})}
        return ["env", *(f"{name}={value}" for name, value in variables.items()), *program]

    def _script(self, verb: str, *words: str, limit_s: float = PATIENCE_S) -> Ended:
        argv = [sys.executable, str(SCRIPT), verb, "--name", self.name, *words]
        return subprocess.run(
            argv, env=outside(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit_s, check=False
        )

    # --- runs

    def submit(self, text: str, *options: str) -> str:
        """Submits a spec; returns the run id."""
        path = self.directory / f"spec-{time.monotonic_ns()}.yaml"
        path.write_text(textwrap.dedent(text))
        run_id: str = self.json("submit", f"{self.there}/{path.name}", *options)["run_id"]
        self.runs.append(run_id)
        return run_id

    def ready(self, text: str, *options: str) -> str:
        """Submits and waits until it is ready; fails with what there is to know if it is not."""
        run_id = self.submit(text, *options)
        done = self.call("wait", run_id, "--for", "ready", "--timeout", str(int(PATIENCE_S) - 20))
        status = self.status(run_id)
        assert status["state"] == "ready", f"{status}\n{done.stdout}{done.stderr}\n{self.logs(run_id)}"
        return run_id

    def status(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json("status", run_id)["runs"][0]
        return found

    def ps(self, run_id: str, role: str = "") -> list[dict[str, Any]]:
        return [view for view in self.json("ps", run_id)["workers"] if role in ("", view["role"])]

    def ended(self, run_id: str, limit_s: float = PATIENCE_S) -> Ended:
        """Waits for its end; the exit status is the run's."""
        return self.call("wait", run_id, "--timeout", str(int(limit_s)), limit_s=limit_s + 60)

    def logs(self, run_id: str) -> str:
        directory = self.directory / "runs" / run_id
        paths = [directory / "batch.log", *sorted((directory / "agents").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in paths if path.exists())

    # --- eyes

    def seen(self, mark: int, node: str) -> list[str]:
        """`PID COMMAND` of each process there that sleeps for this long, by the node's own /proc."""
        pattern = f"sleep {str(mark)[:-1]}[{str(mark)[-1]}]"  # which is not what it looks for
        argv = ["pgrep", "--full", "--list-full", pattern]
        done = self.command(argv, node=node) if self.kernels else subprocess.run(argv, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise Broken(f"cannot look at {node}: {done.stderr.strip()}")
        return [line for line in done.stdout.splitlines() if line]

    def everywhere(self, mark: int) -> dict[str, list[str]]:
        """What is seen on each node that has power; on the first alone where all nodes are this machine."""
        nodes = self.nodes if self.kernels else self.nodes[:1]
        return {node: found for node in nodes if node not in self.down_nodes and (found := self.seen(mark, node))}

    def until(self, done: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> float:
        """Waits for it; returns the seconds that it took."""
        began = time.monotonic()
        while not done():
            assert time.monotonic() < began + limit_s, f"waited {limit_s:g} s for {what}"
            time.sleep(0.25)
        return time.monotonic() - began

    def stranger(self, mark: int, node: str) -> None:
        """A process of nobody's run, which is to live."""
        line = f"setsid -f sleep {mark} </dev/null >/dev/null 2>&1"
        done = self.command(["sh", "-c", line], node=node if self.kernels else "")
        if done.returncode:
            raise Broken(f"no process on {node}: {done.stderr.strip()}")

    def forget(self, mark: int) -> None:
        """Ends those, where they are."""
        for node, found in self.everywhere(mark).items():
            pids = [line.split()[0] for line in found]
            self.command(["sh", "-c", shlex.join(["kill", "-9", *pids])], node=node if self.kernels else "")

    def end(self) -> None:
        """Cancels what was submitted here."""
        for run_id in self.runs:
            self.call("cancel", run_id)
        self.runs.clear()
