"""The nodes of a run on Ray: a placement group of a bundle each, and in each bundle an actor that holds a guardian."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurmfork import names
from slurmfork.agent.grant import LOCAL_DEVICES
from slurmfork.backends import ray_keeper, ray_nodes
from slurmfork.backends.ray_cluster import NoNodes, say
from slurmfork.backends.ray_keeper import Keeper
from slurmfork.backends.ray_nodes import Place, RayRecord
from slurmfork.devices import VARIABLES
from slurmfork.rundir import RunDir

AGENT = Path(__file__).resolve().parent.parent / "agent" / "__main__.py"
LOOK_S = 1.0


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

        ray.cloudpickle.register_pickle_by_value(ray_keeper)
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
