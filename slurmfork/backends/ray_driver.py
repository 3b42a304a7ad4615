"""The Ray backend's launcher: what srun is on Slurm. Asks Ray for nodes, and has an actor on each hold a guardian.

``python -I .../backends/ray_driver.py --nodes N --gpus G --cpus C [--address A]``: node I is ``rayI``, a bundle of a
placement group of which no two are on one of Ray's nodes. Ends with the worst exit status of its guardians; if it is
killed, Ray ends the actors, and with them the guardians hear of it.
``... --on NODE COMMAND...``: run a command on a node, with ``--node NODE`` at its end, and pass its output on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork import names, prctl, process
from slurmfork.agent import guardian
from slurmfork.backends import ray_keeper, ray_nodes
from slurmfork.backends.ray_bundles import LOOK_S, Nodes
from slurmfork.backends.ray_cluster import NoNodes, connected, say
from slurmfork.errors import RunDirError
from slurmfork.messages import StatusView
from slurmfork.names import ENDED_STATES, RunState
from slurmfork.rundir import HeadRecord, RunDir

ERRAND_S = 40.0


class Signals:
    """Signals that have come. Noted alone: within Ray's calls nothing can be raised, and none may be made."""

    def __init__(self) -> None:
        self.told: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.told.append(number))


def watch(ray: Any, nodes: Nodes, ends: dict[Any, str], signals: Signals) -> int:
    """Wait for all guardians, and pass signals on to them; the worst of their exit statuses."""
    worst = 0
    while ends:
        done, _ = ray.wait(list(ends), num_returns=1, timeout=LOOK_S)
        while signals.told:
            nodes.pass_on(signals.told.pop(0))
        for one in done:
            node = ends.pop(one)
            try:
                status = ray.get(one)
            except ray.exceptions.RayError as error:
                status = 128 + signal.SIGKILL
                say(f"Ray has lost {node}: {' '.join(str(error).split())[:300]}")
            if status:
                say(f"the agent of {node} ended with {status}")
            worst = max(worst, status)
    return worst


def given_up(rundir: RunDir) -> bool:
    """Whether the run is about to end, or its head is gone, while Ray lets us wait."""
    with contextlib.suppress(RunDirError):
        head = rundir.read_record(rundir.head, HeadRecord)
        if head is not None and not process.alive(process.Identity(head.pid, head.start_time, head.boot_id)):
            return True
        status = rundir.read_record(rundir.status, StatusView)
        return status is not None and (status.state is RunState.STOPPING or status.state in ENDED_STATES)
    return False


def launch(options: argparse.Namespace) -> int:
    """Get the nodes, have an agent started on each, and wait for their ends."""
    rundir = RunDir(Path(os.environ[names.RUN_DIR]))
    with (
        connected(options.address, options.nodes, options.gpus, options.cpus) as ray,
        Nodes(ray, options.nodes, options.gpus, options.cpus) as nodes,
    ):
        signals = Signals()  # not before: Ray has its own
        if not nodes.await_bundles(lambda: bool(signals.told) or given_up(rundir)):
            return 0
        return watch(ray, nodes, nodes.start(rundir), signals)


def run_on(node: str, command: list[str]) -> int:
    """Run a command on a node: directly if that is this machine, else as a task of Ray's."""
    record = ray_nodes.read(RunDir(Path(os.environ[names.RUN_DIR])))
    place = record.nodes.get(node)
    if place is None:
        say(f"nothing is known of {node}: it was never there")
        return 1
    argv = [*command, "--node", node]
    if place.machine == ray_nodes.this_machine():
        os.execvp(argv[0], argv)  # noqa: S606 (no shell is meant)
    with connected(record.address, 0, 0, 0) as ray:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = [one["NodeID"] for one in ray.nodes() if one["Alive"] and one["NodeManagerAddress"] == place.address]
        if not there:
            say(f"Ray has lost {node}, on {place.host}: nothing can be run there")
            return 1
        chosen = place.node_id if place.node_id in there else there[0]
        pinned = NodeAffinitySchedulingStrategy(node_id=chosen, soft=False)
        ray.cloudpickle.register_pickle_by_value(ray_keeper)
        task = ray.remote(ray_keeper.errand).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        status, output, errors = ray.get(task.remote(argv, ERRAND_S), timeout=ERRAND_S + 5)
    sys.stdout.buffer.write(output)
    sys.stderr.buffer.write(errors)
    return int(status)


def main(arguments: list[str]) -> int:
    """Launch, or run a command on one node."""
    try:
        if arguments[:1] == ["--on"] and len(arguments) > 2:
            return run_on(arguments[1], arguments[2:])
        parser = argparse.ArgumentParser(prog="ray_driver")
        for name in ("--nodes", "--gpus", "--cpus"):
            parser.add_argument(name, type=int, required=True)
        parser.add_argument("--address")
        options = parser.parse_args(arguments)
        # Below a guardian: should this die, a cluster that it has started is ended all the same.
        return guardian.run(lambda parent: drive(options, parent))
    except NoNodes as error:
        say(str(error))
        return 1


def drive(options: argparse.Namespace, parent: int) -> int:
    """``launch``, as the child of a guardian, told in one line why there are no nodes."""
    prctl.signal_at_parents_death(signal.SIGTERM)
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    try:
        return launch(options)
    except NoNodes as error:
        say(f"no nodes: {error}")
        return 1
    except ImportError as error:
        say(f"no nodes: Ray cannot be imported ({error}): pip install 'slurmfork[ray]'")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
