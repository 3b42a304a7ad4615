"""A Ray cluster of local nodes for tests, by Ray's own utility, in a process of its own that Ray's Python runs.

``python ray_cluster.py NODES GPUS CPUS`` prints a line of JSON, adds a node and prints another for each line that it
reads, and ends the cluster when its standard input does.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from running import Shell

from slurmfork import killing, process

MARK = "SLURMFORK_TEST_RAY"
TRIES = 6  # Ray gives a node half a minute to start, which a machine that has much to do may not keep to
MEMORY = 80_000_000  # bytes of each node's object store


class RayCluster:
    """A cluster that is up: ``address``, and ``raylets``, the PID of each node's. ``end`` leaves nothing of it."""

    def __init__(self, python: str, *, nodes: int = 2, gpus: int = 2, cpus: int = 4) -> None:
        self.mark = secrets.token_hex(8)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAY_"))}
        self._process = subprocess.Popen(
            [python, __file__, *map(str, (nodes, gpus, cpus))],
            env={**environment, MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._hear()

    def _hear(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "Ray's cluster did not come up"
        told: dict[str, Any] = json.loads(line)
        self.address: str = told["address"]
        self.raylets: dict[str, int] = told["raylets"]  # by Ray's id of the node, the head's first

    def add_node(self) -> None:
        """Another node, as the others are."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._hear()

    def shell(self, directory: Path, python: str) -> Shell:
        """A user's shell in which this is the cluster."""
        made = Shell(directory, {"RAY_ADDRESS": self.address, "PYTHONPATH": str(ROOT)})
        made.python = python
        return made

    def pids(self) -> list[int]:
        """All processes that were started below it."""
        every = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in every if (process.environ(pid) or {}).get(MARK) == self.mark]

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            left = [one for one in map(process.identify, self.pids()) if one]
            for one in left:
                process.send(one, signal.SIGKILL)
            killing.wait_gone(left, 30)


ROOT = Path(__file__).resolve().parent.parent


def main(nodes: int, gpus: int, cpus: int) -> None:
    from ray.cluster_utils import Cluster

    shape = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": MEMORY, "include_dashboard": False}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=shape))
    del shape["include_dashboard"]
    for _ in range(nodes - 1):
        patiently(lambda: cluster.add_node(**shape))
    tell(cluster)
    for _ in sys.stdin:
        patiently(lambda: cluster.add_node(**shape))
        tell(cluster)
    cluster.shutdown()


def patiently(start: Callable[[], Any]) -> Any:
    for left in reversed(range(TRIES)):
        try:
            return start()
        except Exception as error:
            if not left or "timed out" not in str(error):
                raise
    return None


def tell(cluster: Any) -> None:
    raylets = {node.node_id: node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()}
    print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
