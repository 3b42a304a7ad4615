"""A real Slurm for tests: clusters that scripts/minicluster starts for this test session, and ends with it.
Where there is no Slurm, tests that want one are skipped with the reason, but fail where one is demanded
(CI=true or SLURMFORK_REQUIRE_SLURM=1). Nothing here stands in for Slurm."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "minicluster"
UNAVAILABLE = 3  # the script's exit status where there can be no Slurm
_numbers = itertools.count(1)


def demanded() -> bool:
    return os.environ.get("CI") == "true" or os.environ.get("SLURMFORK_REQUIRE_SLURM") == "1"


def outside_of_slurm() -> dict[str, str]:
    """This process's environment, without what a job around it or another cluster has put there."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))}


class MiniCluster:
    """One cluster: up(), env, nodes, run([...]), down()."""

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"t{os.getpid()}-{next(_numbers)}"
        self.env: dict[str, str] = {}
        self.nodes: list[str] = []

    def up(self, **shape: Any) -> MiniCluster:
        """Takes the options of `minicluster up`: nodes=2, accounting=True, set=["KillWait=5"], ..."""
        limit_s = 1700 if shape.get("slurm") else 300  # a root is made when it is first asked for
        done = self.script("up", *options(shape), *([] if demanded() else ["--no-install"]), limit_s=limit_s)
        if done.returncode == UNAVAILABLE and not demanded():
            pytest.skip(done.stderr.strip())
        if done.returncode != 0:
            pytest.fail(done.stderr.strip())
        status = self.status()
        self.env = {**outside_of_slurm(), "SLURM_CONF": status["conf"]}
        self.nodes = [node["name"] for node in status["nodes"]]
        return self

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.script("status", "--json").stdout)
        return found

    @property
    def home(self) -> Path:
        return Path(self.status()["directory"])

    def down(self) -> None:
        done = self.script("down")
        assert done.returncode == 0, done.stderr
        self.env, self.nodes = {}, []

    def run(self, argv: list[str], *, limit_s: float = 60, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command against this cluster; its failure fails the test, with what it said."""
        done = self._run(argv, env=self.env, limit_s=limit_s)
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(argv)}: exit status {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def script(self, verb: str, *words: str, limit_s: float = 90) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(SCRIPT), verb, "--name", self.name, *words]
        return self._run(argv, env=outside_of_slurm(), limit_s=limit_s)

    def _run(self, argv: list[str], *, env: dict[str, str], limit_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )


def options(shape: dict[str, Any]) -> Iterator[str]:
    """{"nodes": 2, "accounting": True} -> --nodes 2 --accounting"""
    for word, value in shape.items():
        option = "--" + word.replace("_", "-")
        if value is True:
            yield option
        elif value is not False:
            for each in value if isinstance(value, list) else [value]:
                yield from (option, str(each))


class Factory(Protocol):
    def __call__(self, **shape: Any) -> MiniCluster: ...


def words_of(home: Path) -> list[str]:
    """Processes that name the cluster's directory in their command line or environment, zombies aside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"{home}/".encode() in words or f"={home}\0".encode() in words:
            found.append(f"{entry.name}: {words[:80]!r}")
    return found


@pytest.fixture(scope="session")
def minicluster() -> Iterator[Factory]:
    """minicluster(nodes=2, gpus=4): a cluster that is up; the same one for the same shape, all session long.

    Tests share it, so each ends the jobs it has submitted; one that breaks a cluster makes its own.
    """
    made: dict[tuple[str, ...], MiniCluster] = {}

    def get(**shape: Any) -> MiniCluster:
        key = tuple(options(dict(sorted(shape.items()))))
        if key not in made:
            made[key] = MiniCluster().up(**shape)
        return made[key]

    yield get
    for cluster in made.values():
        cluster.down()
