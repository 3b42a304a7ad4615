"""Devices of this machine for the local backend: which GPUs there are, and how its nodes share them.

A machine without any GPU gives its nodes the numbers that the spec asks for, so that a spec for a cluster can be
tried on a laptop; whoever starts a run is told so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from slurmfork.errors import PlanError

VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
# All by which Slurm, or an agent, grants devices to a process.
GRANTS = (*VARIABLES, "GPU_DEVICE_ORDINAL", "HIP_VISIBLE_DEVICES", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE")


def present(environment: Mapping[str, str]) -> list[str]:
    """The devices that this process may use: what a variable grants, else the NVIDIA devices of the machine."""
    for variable in VARIABLES:
        if variable in environment:
            return [part for part in environment[variable].split(",") if part]
    found = [match[1] for path in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name))]
    return sorted(found, key=int)


def share(devices: list[str], nodes: int, gpus: int) -> list[list[str]]:
    """Devices of each of ``nodes`` nodes of ``gpus`` GPUs; raises PlanError with the arithmetic if they do not do."""
    if not devices:
        return [[str(number) for number in range(gpus)] for _ in range(nodes)]
    if nodes * gpus > len(devices):
        raise PlanError(
            f"{nodes} nodes of {gpus} GPUs are {nodes * gpus} GPUs; this machine has {len(devices)} "
            f"({','.join(devices)}): ask for fewer, or submit to Slurm"
        )
    return [devices[node * gpus : (node + 1) * gpus] for node in range(nodes)]


def of_this_process(nodes: int, gpus: int) -> list[list[str]]:
    """``share`` of what this process may use."""
    return share(present(os.environ), nodes, gpus)
