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
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork import devices, names, prctl, process
from slurmfork.agent import guardian
from slurmfork.agent.grant import CUDA, LOCAL_DEVICES
from slurmfork.backends import ray_nodes
from slurmfork.backends.ray_nodes import Place, RayRecord
from slurmfork.devices import VARIABLES
from slurmfork.errors import PlanError, RunDirError
from slurmfork.messages import StatusView
from slurmfork.names import ENDED_STATES, RunState
from slurmfork.rundir import HeadRecord, RunDir

AGENT = Path(__file__).resolve().parent.parent / "agent" / "__main__.py"
ERRAND_S = 40.0
LOOK_S = 1.0
CONNECT_S = 10.0


class NoNodes(Exception):
    """Ray has no such nodes, and why."""


class Signals:
    """Signals that have come. Noted alone: within Ray's calls nothing can be raised, and none may be made."""

    def __init__(self) -> None:
        self.told: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.told.append(number))


# --- on the nodes: Ray brings these there by value, where no package of ours need be ------------------------


class Keeper:
    """An actor that holds the guardian of a node, its child, which hears of its end."""

    def where(self) -> tuple[str, str, str]:
        """(Ray's id of the node, host name, what tells machines apart)."""
        import ray

        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
        return ray.get_runtime_context().get_node_id(), os.uname().nodename, machine

    async def start(self, node: str, argv: list[str], environment: dict[str, str], options: dict[str, Any]) -> None:
        """Start the guardian with the devices that Ray granted here; raises OSError."""
        import asyncio

        import ray

        granted = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        own = {name: os.environ[name] for name in options["variables"] if name in os.environ}
        if not granted:
            own = {}
        environment = {**environment, **own, options["devices"]: ",".join(map(str, granted))}
        log = os.open(options["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.guardian = subprocess.Popen(  # noqa: ASYNC220 (by this thread, whose end is the actor's)
                argv,
                env=environment,
                cwd=options["cwd"],
                umask=options["umask"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        # Ray's own watch takes no raylet for dead whose children went to another than init: a systemd of the user's.
        self.orphaned = False
        self.raylet = os.pidfd_open(raylet := os.getppid())
        asyncio.get_running_loop().add_reader(self.raylet, self._orphan)
        if os.getppid() != raylet:  # it ended before we looked
            self._orphan()

    def _orphan(self) -> None:
        """The raylet is gone, and nobody else would tell the guardian."""
        import asyncio

        asyncio.get_running_loop().remove_reader(self.raylet)
        self.orphaned = True
        self.guardian.send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Its exit status, once it has ended."""
        import asyncio

        code = await asyncio.get_running_loop().run_in_executor(None, self.guardian.wait)
        if self.orphaned:
            os._exit(1)
        return code if code >= 0 else 128 - code

    async def signal(self, number: int) -> None:
        """Pass a signal on to it."""
        self.guardian.send_signal(number)


def errand(argv: list[str], limit: float) -> tuple[int, bytes, bytes]:
    """Run a command here; (exit status, output, errors)."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, check=False)
    return done.returncode, done.stdout, done.stderr


# --- nodes -------------------------------------------------------------------------------------------------


class Nodes:
    """The bundles and actors of a run. As a context manager it gives everything back."""

    def __init__(self, ray: Any, count: int, gpus: int, cpus: int) -> None:
        self._ray, self._count, self._gpus, self._cpus = ray, count, gpus, cpus
        self._group: Any = None
        self.keepers: dict[str, Any] = {}

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *exception: object) -> None:
        from ray.util.placement_group import remove_placement_group

        if self._group is not None:
            remove_placement_group(self._group)

    def await_bundles(self, given_up: Callable[[], bool]) -> bool:
        """Wait for the placement group, however long; False if nobody wants it any more. Raises NoNodes."""
        from ray.util.placement_group import placement_group

        self._refuse_what_cannot_be()
        bundle = {"CPU": self._cpus, **({"GPU": self._gpus} if self._gpus else {})}
        self._group = placement_group([bundle] * self._count, strategy="STRICT_SPREAD")
        said = False
        while not self._group.wait(LOOK_S):
            if given_up():
                return False
            self._refuse_what_cannot_be()
            if not said:
                say(f"waiting for Ray to give {self._wanted()}; it has them, but not free")
                said = True
        return True

    def _wanted(self) -> str:
        return f"{self._count} nodes of {self._gpus} GPUs and {self._cpus} CPUs"

    def _refuse_what_cannot_be(self) -> None:
        """Nodes that Ray does not have at all are not waited for."""
        there = [node for node in self._ray.nodes() if node["Alive"]]
        wanted = {"GPU": self._gpus, "CPU": self._cpus}
        fit = [node for node in there if all(node["Resources"].get(key, 0) >= need for key, need in wanted.items())]
        if len(fit) < self._count:
            shown = ", ".join(
                f"{node['NodeManagerAddress']} ({node['Resources'].get('GPU', 0):g} GPUs, "
                f"{node['Resources'].get('CPU', 0):g} CPUs)"
                for node in there[:8]
            )
            raise NoNodes(
                f"{self._wanted()} each on a node of its own are asked for, and {len(fit)} of Ray's {len(there)} nodes "
                f"would do: {shown}; ask for fewer, or smaller ones, under `ray:`"
            )

    def start(self, rundir: RunDir) -> dict[Any, str]:
        """Start a guardian on each node; node by the reference that its end will resolve."""
        ray = self._ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        keeper = ray.remote(Keeper)
        for index in range(self._count):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            made = keeper.options(
                num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, scheduling_strategy=place
            ).remote()
            self.keepers[f"ray{index}"] = made
        self._record(rundir)
        environment = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, names.NODE)}
        umask = os.umask(0o077)
        os.umask(umask)
        begun = []
        for node, made in self.keepers.items():
            options = {
                "log": str(rundir.agent_log(node)),
                "cwd": str(Path.cwd()),
                "umask": umask,
                "variables": VARIABLES,
                "devices": LOCAL_DEVICES,
            }
            argv = [sys.executable, "-I", str(AGENT)]
            begun.append(made.start.remote(node, argv, {**environment, names.NODE: node}, options))
        for node, one in zip(self.keepers, begun, strict=True):
            try:
                ray.get(one)
            except Exception as error:
                why = " ".join(str(getattr(error, "cause", None) or error).split())[-300:]
                raise NoNodes(f"no agent could be started on {node}: {why}") from None
        return {made.ended.remote(): node for node, made in self.keepers.items()}

    def _record(self, rundir: RunDir) -> None:
        found = self._ray.get([made.where.remote() for made in self.keepers.values()])
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in self._ray.nodes()}
        record = RayRecord(address=self._ray.get_runtime_context().gcs_address)
        for node, (node_id, host, machine) in zip(self.keepers, found, strict=True):
            record.nodes[node] = Place(node_id=node_id, address=addresses[node_id], host=host, machine=machine)
        ray_nodes.write(rundir, record)

    def pass_on(self, number: int) -> None:
        """A signal, to all guardians."""
        for made in self.keepers.values():
            made.signal.remote(number)


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


# --- Ray ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(address: str | None, count: int, gpus: int, cpus: int) -> Iterator[Any]:
    """Ray's module, connected: to ``address``, else to RAY_ADDRESS, else to a cluster that is started here."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    cluster = None
    if wanted := address or os.environ.get("RAY_ADDRESS"):
        _look_for(wanted)
        try:
            ray.init(address=wanted, **quiet)
        except ConnectionError as error:
            raise NoNodes(f"Ray does not answer at {wanted}: {error}") from None
    else:
        cluster = _started(count, gpus, cpus)
        ray.init(address=cluster.address, **quiet)
    try:
        yield ray
    finally:
        ray.shutdown()
        if cluster is not None:
            cluster.shutdown()


def _started(count: int, gpus: int, cpus: int) -> Any:
    """A cluster on this machine, whose nodes share its GPUs; where it has none, their numbers stand for nothing."""
    from ray.cluster_utils import Cluster

    try:
        granted = devices.of_this_process(count, gpus)
    except PlanError as error:
        raise NoNodes(str(error)) from None
    real = bool(devices.present(os.environ))
    before = os.environ.pop(CUDA, None)
    cluster = Cluster()
    for own in granted:
        if real:
            os.environ[CUDA] = ",".join(own)  # by which Ray knows what a node that it starts has
        cluster.add_node(num_cpus=max(cpus, 1), num_gpus=gpus, include_dashboard=False)
    os.environ.pop(CUDA, None)
    if before is not None:
        os.environ[CUDA] = before
    return cluster


def _look_for(address: str) -> None:
    """Ray itself would try for minutes; raises NoNodes if nobody listens there."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise NoNodes(f"{address} is not a cluster's own address: give host:port, as `ray start --head` tells it")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as error:
            raise NoNodes(f"Ray does not answer at {address}: {error.strerror or error}") from None


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
        task = ray.remote(errand).options(num_cpus=0, max_retries=0, scheduling_strategy=pinned)
        status, output, errors = ray.get(task.remote(argv, ERRAND_S), timeout=ERRAND_S + 5)
    sys.stdout.buffer.write(output)
    sys.stderr.buffer.write(errors)
    return int(status)


def say(text: str) -> None:
    print(f"slurmfork: {text}", file=sys.stderr, flush=True)


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
