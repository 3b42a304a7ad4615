"""Verbs over SSH beside OpenSSH: `status` of a thousand runs and `ssh host squeue`, in turn."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNS = 1000
TURNS = 9
SPEC = """name: quick
nodes: 1
slurm: {time: 5}
roles:
  rollout: {command: ["true"]}
"""


def measure(bench: Any) -> None:
    """``bench`` is scripts/bench's."""
    with bench.cluster("bench-afar", 2, 2, "--ssh") as cluster:
        ssh = cluster["ssh"]
        user = next(iter(ssh["users"].values()))
        home = Path(ssh["homes"]) / user
        laptop = Laptop(bench.directory, Path(ssh["config"]), home / ".slurmfork" / "venv" / "bin" / "python")
        laptop.bootstrap()
        run_id = json.loads(laptop.call("submit", "--json", str(laptop.spec)))["run_id"]
        laptop.call("wait", run_id)
        run = home / ".slurmfork" / "runs" / run_id
        await_file(run / "batch.status")  # the last that is written there
        copies(run, user)
        ours, theirs = [], []
        for _ in range(TURNS):
            theirs.append(took(["ssh", "-F", ssh["config"], "login", "squeue"]))
            ours.append(took(laptop.words("status", "--json"), laptop.env))
        shown = len(json.loads(laptop.call("status", "--json"))["runs"])
        title = f"status of {shown} runs by SSH"
        bench.add(title, statistics.median(ours), "s", "ssh squeue", statistics.median(theirs), bound="<= 3")


class Laptop:
    """A client with another home and no Slurm on its PATH.

    Its slurmfork is the one that bootstrap installed: a user's install, where the bench's own is an editable one,
    whose imports cost more.
    """

    def __init__(self, directory: Path, config: Path, python: Path) -> None:
        home, programs = directory / "laptop", directory / "programs"
        (home / ".ssh").mkdir(parents=True)
        programs.mkdir()
        (home / ".ssh" / "config").write_text(f"Include {config}\n")
        (home / "config.toml").write_text('[clusters.big]\nhost = "login"\n')
        self.spec = home / "quick.yaml"
        self.spec.write_text(SPEC)
        self.python = python
        self.env = {"HOME": str(home), "PATH": str(programs), "SLURMFORK_CONFIG": str(home / "config.toml")}

    def bootstrap(self) -> None:
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        subprocess.run(
            [sys.executable, "-m", "slurmfork", "cluster", "bootstrap", "big"],
            env={**self.env, "XDG_CACHE_HOME": cache},
            check=True,
        )

    def words(self, verb: str, *arguments: str) -> list[str]:
        return [str(self.python), "-I", "-m", "slurmfork", verb, "--cluster", "big", *arguments]

    def call(self, verb: str, *arguments: str) -> str:
        done = subprocess.run(self.words(verb, *arguments), env=self.env, check=True, capture_output=True, text=True)
        return done.stdout


def await_file(path: Path, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"bench: {path} is not there after {limit_s:g} s")
        time.sleep(0.01)


def copies(of: Path, user: str) -> None:
    """Makes RUNS of one ended run: its directory under other ids, which stand in its records too."""
    owner = pwd.getpwnam(user)
    for number in range(RUNS - 1):
        run_id = f"quick-b{number:05d}"
        directory = of.parent / run_id
        shutil.copytree(of, directory, symlinks=True)
        for path in [directory, *directory.rglob("*")]:
            if path.is_file() and not path.is_symlink() and of.name.encode() in path.read_bytes():
                path.write_bytes(path.read_bytes().replace(of.name.encode(), run_id.encode()))
            os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)


def took(command: list[str], env: dict[str, str] | None = None) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began
