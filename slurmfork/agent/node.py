"""The node: what an agent learns from its environment and /proc about where it is and what it was granted.

Read once, at the agent's start; starts nothing and asks nobody.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slurmfork import names
from slurmfork.agent import grant, guardian
from slurmfork.errors import UsageError
from slurmfork.messages import Device
from slurmfork.rundir import RunDir


@dataclass(frozen=True)
class Node:
    """Facts of one node of a run. ``environment`` is the agent's own; ``heads`` are tried in order.

    ``devices``, ``shared``, ``amd`` and ``variables`` are what was granted (``agent.grant``).
    ``kill_wait``: seconds from Slurm's SIGTERM to its SIGKILL.
    """

    name: str
    run_id: str
    rundir: RunDir
    heads: tuple[tuple[str, int], ...]
    devices: tuple[Device, ...]
    environment: Mapping[str, str]
    cpus: int = 1
    shared: tuple[Device, ...] = ()
    amd: bool = False
    variables: tuple[str, ...] = ()
    guarantee: Literal["namespace", "cgroup", "rings"] = "rings"
    kill_wait: float = guardian.DEFAULT_KILL_WAIT_S
    notes: tuple[str, ...] = ()


def here(environment: Mapping[str, str]) -> Node:
    """This node, by the agent's environment; raises UsageError where that is not one of a run."""
    run_id = _required(environment, names.RUN_ID, names.RUN_ID_PATTERN)
    directory = Path(environment.get(names.RUN_DIR, ""))
    if not directory.is_absolute():
        raise UsageError(f"{names.RUN_DIR} is not an absolute path: the head starts agents, people do not")
    name = guardian.node_name()
    if not names.NODE_PATTERN.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a node; {names.NODE} may give another")
    found = grant.granted(environment)
    return Node(
        name=name,
        run_id=run_id,
        rundir=RunDir(directory),
        heads=_addresses(environment.get(names.HEAD, "")),
        devices=found.devices,
        shared=found.shared,
        environment=environment,
        cpus=_cpus(environment),
        amd=found.amd,
        variables=found.variables,
        guarantee=_guarantee(_cgroups()),
        kill_wait=guardian.kill_wait(environment),
        notes=found.notes,
    )


def _cpus(environment: Mapping[str, str]) -> int:
    """CPUs granted here: Slurm's count, which holds where it binds nobody too, else those that we may run on."""
    count = environment.get("SLURM_CPUS_ON_NODE", "")
    return int(count) if count.isdigit() and int(count) > 0 else len(os.sched_getaffinity(0))


def _required(environment: Mapping[str, str], name: str, pattern: re.Pattern[str]) -> str:
    value = environment.get(name, "")
    if not pattern.fullmatch(value):
        raise UsageError(f"{name} is {value!r}: the head starts agents, people do not")
    return value


def _addresses(text: str) -> tuple[tuple[str, int], ...]:
    found = []
    for entry in text.split(","):
        host, _, port = entry.strip().rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"{names.HEAD} is {text!r}, not ip:port[,ip:port]: the head starts agents")
        found.append((host.strip("[]"), int(port)))
    return tuple(found)


def _cgroups() -> str:
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def _guarantee(cgroups: str) -> Literal["cgroup", "rings"]:
    """Whether Slurm tracks this step by cgroup: on v2 the one there is, on v1 the freezer, by which it kills."""
    for line in cgroups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        tracking = (number == "0" and not controllers) or "freezer" in controllers.split(",")
        if tracking and re.search(r"slurm.*/[^/]+/step_[^/]+", path):
            return "cgroup"
    return "rings"
