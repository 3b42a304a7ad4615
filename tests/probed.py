"""Local runs for tests of probes: their processes, to be frozen and killed, and what a probe says of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from processes import wait_until
from running import ISOLATED, Shell

from slurmfork import process
from slurmfork.process import Identity
from slurmfork.rundir import RunDir

SPEC = """
    name: probed
    backend: local
    nodes: 3
    roles:
      rollout: {per_node: 2, command: [sleep, "1000"]}
"""


class Nodes:
    """The processes of a local run: freeze(), and kill() what a test wants dead."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.run_id = shell.ready(shell.spec(SPEC))
        self.directory = RunDir(shell.root / self.run_id)
        views = {view["worker"]: view for view in shell.ps(self.run_id)}
        self.workers = {name: self._identify(view["pid"]) for name, view in views.items()}
        self.node_of = {name: view["node"] for name, view in views.items()}
        status = shell.status(self.run_id)
        self.batch = self._identify(int(status["job_id"]))
        self.head = self._identify(json.loads(self.directory.head.read_text())["pid"])
        self.agents = {node["node"]: self._identify(node["agent_pid"]) for node in status["nodes"]}
        self.guardians = {node["node"]: self._identify(node["guardian_pid"]) for node in status["nodes"]}

    @staticmethod
    def _identify(pid: int) -> Identity:
        found = process.identify(pid)
        assert found is not None
        return found

    @contextmanager
    def frozen(self, *those: Identity) -> Iterator[None]:
        """Stopped until the end of the block, so that nobody reacts to what is done meanwhile."""
        try:
            for one in those:
                process.send(one, signal.SIGSTOP)
            yield
        finally:
            for one in reversed(those):
                process.send(one, signal.SIGCONT)

    def kill(self, *those: Identity) -> None:
        for one in those:
            process.send(one, signal.SIGKILL)
        wait_until(lambda: not any(process.alive(one) for one in those), "what was killed to be gone")

    def gone_with_the_agent(self, node: str) -> dict[str, str]:
        """What a probe says of whom the end of an agent has ended by itself: in a namespace all workers of its node."""
        those = [name for name, where in self.node_of.items() if ISOLATED and where == node]
        wait_until(lambda: not any(process.alive(self.workers[name]) for name in those), "init to end the workers")
        return {f"_{name.partition('/')[2]}": "gone" for name in those}

    def probe(self, *options: str, verb: str = "ps", status: int = 0) -> dict[str, Any]:
        done = self.shell.call(verb, self.run_id, "--probe", "--json", *options)
        assert done.returncode == status, f"{done.stdout}{done.stderr}"
        found: dict[str, Any] = json.loads(done.stdout)["probe"]
        return found


def verdicts(found: Mapping[str, Any]) -> dict[str, str]:
    return {one["worker"]: one["verdict"] for one in found["workers"]}


def reason(found: Mapping[str, Any], worker: str) -> str:
    return next(one["reason"] for one in found["workers"] if one["worker"] == worker)


def all_alive(nodes: Nodes, **but: str) -> dict[str, str]:
    return {
        **dict.fromkeys(nodes.workers, "alive"),
        **{f"rollout/{name[1:]}": verdict for name, verdict in but.items()},
    }
