"""Commands run against a cluster, and the environment that makes them its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from mini.processes import TAG
from mini.words import Cluster, Failed


def client_env(cluster: Cluster) -> dict[str, str]:
    """The caller's environment, without what a job around it or another cluster has put there."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
    return {**kept, "SLURM_CONF": str(cluster.conf), "PATH": search_path(cluster)}


def search_path(cluster: Cluster) -> str:
    """With a cluster's own commands first, where it is of another release than this machine."""
    found = os.environ.get("PATH", "/usr/bin:/bin")
    return f"{commands(cluster)}:{found}" if commands(cluster).is_dir() else found


def commands(cluster: Cluster) -> Path:
    return cluster.home / "bin"


def daemon_env(cluster: Cluster) -> dict[str, str]:
    own = {TAG: str(cluster.home), "SLURMFORK_MINICLUSTER_DIR": str(cluster.home.parent)}
    return {**client_env(cluster), **own, "MYSQL_UNIX_PORT": f"{cluster.home}/db/sock"}


def command(*argv: str, env: dict[str, str], limit_s: float = 60, stdin: str = "") -> str:
    """Runs a client to its end and returns what it printed."""
    try:
        done = subprocess.run(
            argv,
            env=env,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{argv[0]} gave no answer in {limit_s:g} s") from None
    if done.returncode != 0:
        raise Failed(f"{argv[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def node_states(cluster: Cluster) -> dict[str, str]:
    """Each node's state word; empty when slurmctld does not answer."""
    try:
        out = command("sinfo", "-h", "-N", "-o", "%N|%T", env=client_env(cluster), limit_s=15)
    except Failed:
        return {}
    states = dict(line.strip().split("|", 1) for line in out.splitlines() if "|" in line)
    return {name: states[name] for name in sorted(states, key=lambda name: (len(name), name))}
