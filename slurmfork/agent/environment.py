"""The environment of a worker: the node's own, minus what would mislead it, plus the order's, plus ours.

A pure function of node, order and places; reads nothing of the running process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from slurmfork import names
from slurmfork.agent.grant import CUDA, LOCAL_DEVICES
from slurmfork.agent.node import Node
from slurmfork.messages import Device
from slurmfork.orders import Order

NOTIFY_SOCKET = "NOTIFY_SOCKET"

# A worker is no task of the step that started the agent: whoever believed so (Lightning, JAX, an MPI library
# that would call back to srun) would take each for rank 0 of one task a node. What tells of the job stays.
_TASK = re.compile(
    r"""SLURM_(?:PROCID|LOCALID|GTIDS|TASK_PID|NTASKS|NPROCS|NTASKS_PER_\w+|TASKS_PER_NODE|STEPID|STEP_ID
        |STEP_(?:NUM_\w+|TASKS_PER_NODE|NODELIST|LAUNCHER_\w+)|LAUNCH_NODE_IPADDR|SRUN_COMM_\w+|MPI_TYPE
        |PMI\w*|CPU_BIND\w*|MEM_BIND\w*|DISTRIBUTION|STD(?:IN|OUT|ERR)MODE)""",
    re.VERBOSE,
)
_RANK = re.compile(r"(?:LOCAL_|NODE_|GROUP_|ROLE_|CROSS_)?(?:RANK|WORLD_SIZE)|MASTER_(?:ADDR|PORT)|TORCHELASTIC_\w+")
_OURS = frozenset(
    {
        names.HEAD,
        names.WORKER,
        names.ROLE,
        names.INDEX,
        names.PORTS,
        names.AGENT,
        names.TARGET,
        LOCAL_DEVICES,
        names.KILL_WAIT,
        names.ISOLATION,
        names.SHARES,
        NOTIFY_SOCKET,
        "SLURMFORK_ENGINE",
    }
)
_WITHIN = frozenset({"HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"})  # positions within what another variable leaves


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker may have of the agent's environment."""
    return {name: value for name, value in environment.items() if not _withheld(name)}


def _withheld(name: str) -> bool:
    if name in _OURS or name in _WITHIN or name.startswith("SLURMFORK_GUARDIAN_"):
        return True
    return any(pattern.fullmatch(name) for pattern in (_TASK, _RANK, names.LAUNCHED_PATTERN))


def slice_of(devices: Sequence[Device], positions: Sequence[int]) -> list[Device]:
    """The granted devices at these positions; raises ValueError for one that there is not."""
    for position in positions:
        if not 0 <= position < len(devices):
            raise ValueError(f"device {position} was asked for, the node was granted {len(devices)}")
    return [devices[position] for position in positions]


def device_variables(node: Node, devices: Sequence[Device]) -> dict[str, str]:
    """The variables that leave a worker these devices; CUDA's is always there, empty for none.

    What a node only shares with others is for all of its workers.
    """
    seen = devices or node.shared
    listed = ",".join(str(device) for device in seen)
    # On AMD the other two only take away from what ROCR_VISIBLE_DEVICES leaves, counted from 0.
    found = {CUDA: ",".join(str(number) for number in range(len(seen))) if node.amd else listed}
    found.update(dict.fromkeys(node.variables, listed))
    return found


def of_worker(
    node: Node, order: Order, *, base: Mapping[str, str], ports: Sequence[int], socket: Path, scratch: Path,
    notify: Path | None,
) -> dict[str, str]:  # fmt: skip
    """The whole environment of one worker; later words win. ``base`` is what ``inherited`` made."""
    role, _, index = order.worker.partition("/")
    found = {**base, "TMPDIR": str(scratch), **order.env}
    if node.devices or node.shared:
        found.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # Slurm's, and else CUDA puts the fastest first
    if "OMP_NUM_THREADS" not in found and _several(order.env.get("LOCAL_WORLD_SIZE", "")):
        found["OMP_NUM_THREADS"] = "1"  # as torchrun does: else each of N workers takes every core
    found.update(
        {
            names.RUN_ID: node.run_id,
            names.RUN_DIR: str(node.rundir.path),
            names.NODE: node.name,
            names.WORKER: order.worker,
            names.ROLE: role,
            names.INDEX: index,
            names.PORTS: ",".join(str(port) for port in ports),
            names.AGENT: str(socket),
            **device_variables(node, slice_of(node.devices, order.devices)),
        }
    )
    if order.target:
        found[names.TARGET] = order.target
    if notify:
        found[NOTIFY_SOCKET] = str(notify)
    return found


def _several(count: str) -> bool:
    return count.isascii() and count.isdigit() and int(count) > 1
