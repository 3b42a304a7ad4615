"""Runs for tests, driven as a user drives them: by the command line, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slurmfork import process

PATIENCE = 120.0
ISOLATED = os.environ.get("SLURMFORK_TEST_ISOLATION")  # namespace: all runs of a shell's, in namespaces
GUARANTEE = "namespace" if ISOLATED else "rings"  # of a node of these, where no cgroup tracker of Slurm's is


class Shell:
    """A user's shell: an environment with a root for run directories, and the `slurmfork` command in it.

    ``end`` cancels what it submitted and fails the test if a process of it is left on this machine.
    ``umask``: the shell's, in place of this process's own. ``python`` is the Python that has slurmfork in it.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str] | None = None, *, umask: int = -1) -> None:
        self.directory = directory
        self.umask = umask
        self.python = sys.executable
        self.root = directory / "runs"
        base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env = {**base, **(environment or {}), "SLURMFORK_ROOT": str(self.root), "COLUMNS": "200"}
        self.runs: list[str] = []

    def spec(self, text: str, name: str = "spec.yaml") -> Path:
        """Write a spec file; returns its path."""
        path = self.directory / name
        path.write_text(textwrap.dedent(text))
        return path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `slurmfork ...` and leave it running."""
        return subprocess.Popen(
            [self.python, "-m", "slurmfork", *arguments],
            env=self.env,
            cwd=self.directory,
            umask=self.umask,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: str, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """`slurmfork ...`, whatever its exit status."""
        return subprocess.run(
            [self.python, "-m", "slurmfork", *arguments],
            env=self.env,
            cwd=self.directory,
            umask=self.umask,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def json(self, *arguments: str) -> Any:
        """`slurmfork ... --json` that succeeds, decoded."""
        verb, *rest = arguments
        done = self.call(verb, "--json", *rest)
        assert done.returncode == 0, f"slurmfork {' '.join(arguments)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def submit(self, spec: Path, *options: str) -> str:
        """Submit; returns the run id."""
        isolated = ["--set", f"isolation={ISOLATED}"] if ISOLATED else []
        run_id: str = self.json("submit", str(spec), *isolated, *options)["run_id"]
        self.runs.append(run_id)
        return run_id

    def ready(self, spec: Path, *options: str) -> str:
        """Submit and wait until it is ready; fails with the reason and the agents' logs if it is not."""
        run_id = self.submit(spec, *options)
        done = self.call("wait", run_id, "--for", "ready")
        status = self.status(run_id)
        assert status["state"] == "ready", f"{status}\n{done.stdout}{done.stderr}\n{self.logs(run_id)}"
        return run_id

    def status(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.json("status", run_id)["runs"][0]
        return found

    def ps(self, run_id: str, role: str | None = None) -> list[dict[str, Any]]:
        views = self.json("ps", run_id)["workers"]
        return [view for view in views if role in (None, view["role"])]

    def logs(self, run_id: str) -> str:
        """The batch log and the agents' logs, for messages of failing tests."""
        directory = self.root / run_id
        paths = [directory / "batch.log", *sorted((directory / "agents").glob("*.log"))]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in paths if path.exists())

    def left(self, run_id: str) -> list[str]:
        """Descriptions of processes that carry the run's tag."""
        return [process.describe(one) for one in process.tagged(run_id)]

    def pids(self, run_id: str) -> list[int]:
        """PIDs of all processes that carry the run's tag."""
        return [one.pid for one in process.tagged(run_id)]

    def end(self) -> None:
        for run_id in self.runs:
            self.call("cancel", run_id)
        left = {run_id: self.left(run_id) for run_id in self.runs}
        assert not any(left.values()), f"left running: {left}"


def environ_of(pid: int) -> dict[str, str]:
    """A process's environment as it was started."""
    found = process.environ(pid)
    assert found is not None, f"process {pid} is gone"
    return found


def command_of(pid: int) -> Sequence[str]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
