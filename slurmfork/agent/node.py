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
from slurmfork.agent import guardian
from slurmfork.errors import UsageError
from slurmfork.messages import Device
from slurmfork.rundir import RunDir

LOCAL_DEVICES = "SLURMFORK_LOCAL_DEVICES"

CUDA, ROCR, ZE = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"
_NO_DEVICE = frozenset({"", "-1", "none", "void", "nodevfiles"})


@dataclass(frozen=True)
class Node:
    """Facts of one node of a run. ``environment`` is the agent's own; ``heads`` are tried in order.

    ``amd``: the devices are AMD's, whose CUDA_VISIBLE_DEVICES counts within ROCR_VISIBLE_DEVICES.
    ``kill_wait``: seconds from Slurm's SIGTERM to its SIGKILL.
    """

    name: str
    run_id: str
    rundir: RunDir
    heads: tuple[tuple[str, int], ...]
    devices: tuple[Device, ...]
    environment: Mapping[str, str]
    cpus: int = 1
    amd: bool = False
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
    amd = _is_amd(environment)
    devices = granted_devices(environment, amd=amd)
    return Node(
        name=name,
        run_id=run_id,
        rundir=RunDir(directory),
        heads=_addresses(environment.get(names.HEAD, "")),
        devices=devices,
        environment=environment,
        cpus=_cpus(environment),
        amd=amd,
        guarantee=_guarantee(_cgroups()),
        kill_wait=guardian.kill_wait(environment),
        notes=_notes(environment, devices),
    )


def granted_devices(environment: Mapping[str, str], *, amd: bool = False) -> tuple[Device, ...]:
    """The devices that this node was granted, in order; numbers where they are numbers, else as they are."""
    order = (LOCAL_DEVICES, ROCR, CUDA, ZE) if amd else (LOCAL_DEVICES, CUDA, ROCR, ZE)
    text = next((environment[name] for name in order if name in environment), "")
    words = [word.strip() for word in text.split(",")]
    if words[0].lower() in _NO_DEVICE:
        return ()
    return tuple(int(word) if word.isascii() and word.isdigit() else word for word in words if word)


def _cpus(environment: Mapping[str, str]) -> int:
    """CPUs granted here: Slurm's count, which holds where it binds nobody too, else those that we may run on."""
    count = environment.get("SLURM_CPUS_ON_NODE", "")
    return int(count) if count.isdigit() and int(count) > 0 else len(os.sched_getaffinity(0))


def _is_amd(environment: Mapping[str, str]) -> bool:
    """Slurm may set every vendor's variable on every node: where it did, the driver's device tells."""
    return ROCR in environment and (CUDA not in environment or Path("/dev/kfd").exists())


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


def _notes(environment: Mapping[str, str], devices: tuple[Device, ...]) -> tuple[str, ...]:
    count = environment.get("SLURM_GPUS_ON_NODE", "")
    if not devices and count.isdigit() and int(count) > 0:
        return (f"Slurm granted {count} GPUs here but named none in CUDA_VISIBLE_DEVICES: none are used",)
    return ()
