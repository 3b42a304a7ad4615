"""The grant: which devices Slurm gave to this node, whole or shared, read from what it says of them.

By the vendors' variables, in Slurm's order; where a site has these switched off, by the numbers that Slurm tells.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slurmfork import names
from slurmfork.messages import Device

LOCAL_DEVICES = "SLURMFORK_LOCAL_DEVICES"
CUDA, ROCR, ZE, OPENCL = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "GPU_DEVICE_ORDINAL"
SHARDS = "SLURM_SHARDS_ON_NODE"
DEVICES = Path("/dev")

_NO_DEVICE = frozenset({"", "-1", "none", "void", "nodevfiles"})
_VENDORS = (CUDA, ROCR, ZE)


@dataclass(frozen=True)
class Grant:
    """``devices`` are this node's own, in order; ``shared`` are parts of GPUs that others may be on, too.

    ``amd``: they are AMD's, whose CUDA_VISIBLE_DEVICES counts within ROCR_VISIBLE_DEVICES. ``variables`` name, beside
    CUDA's, those by which a worker is given its own. ``notes`` are to be shown.
    """

    devices: tuple[Device, ...] = ()
    shared: tuple[Device, ...] = ()
    amd: bool = False
    variables: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def granted(environment: Mapping[str, str], *, places: Path = DEVICES) -> Grant:
    """What was granted here, by the agent's environment. ``places`` is where device files are."""
    amd = _is_amd(environment, places)
    variables = tuple(name for name in (ROCR, ZE) if name in environment)
    order = (LOCAL_DEVICES, ROCR, CUDA, ZE, OPENCL) if amd else (LOCAL_DEVICES, CUDA, ROCR, ZE, OPENCL)
    named = next((name for name in order if name in environment), None)
    notes: tuple[str, ...] = ()
    if named is not None:
        found = _listed(environment[named])
        if named == OPENCL:
            variables = (OPENCL,)
    else:
        found = _by_slurms_numbers(environment, places)
        variables = (ROCR,) if amd else ()
    if count := _count(environment.get("SLURM_GPUS_ON_NODE", "")):
        if not found:
            notes = (f"Slurm granted {count} GPUs here but named none: none are used",)
        elif named is None:
            shown = _shown(found)
            notes = (f"no variable names the {count} GPUs granted here; by Slurm's own numbers they are {shown}",)
    if named == LOCAL_DEVICES or not (kind := _share(environment)):
        return Grant(found, amd=amd, variables=variables, notes=notes)
    note = f"granted {kind} of GPU {_shown(found)}, which all workers see: no GPU is whole, as roles with `gpus` need"
    return Grant(shared=found, amd=amd, variables=variables, notes=(note,))


def _listed(text: str) -> tuple[Device, ...]:
    """Numbers where they are numbers, else as they are: UUIDs of GPUs or MIG slices, tiles."""
    words = [word.strip() for word in text.split(",")]
    if words[0].lower() in _NO_DEVICE:
        return ()
    return tuple(int(word) if word.isascii() and word.isdigit() else word for word in words if word)


def _by_slurms_numbers(environment: Mapping[str, str], places: Path) -> tuple[Device, ...]:
    """Where no vendor's variable is set (``no_gpu_env``): numbers of the node, or places among what was granted."""
    text = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS") or ""
    numbers = [int(word) for word in text.split(",") if word.isascii() and word.isdigit()]
    return tuple(range(len(numbers))) if _constrained(numbers, places) else tuple(numbers)


def _constrained(numbers: Sequence[int], places: Path) -> bool:
    """Whether a device that was not granted cannot be opened: what a program sees is counted from 0 then."""
    for path in places.glob("nvidia*"):
        number = re.fullmatch(r"nvidia(\d+)", path.name)
        if number and int(number[1]) not in numbers:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                return error.errno == errno.EPERM  # the cgroup's answer; file modes say EACCES
            return False
    return False


def _is_amd(environment: Mapping[str, str], places: Path) -> bool:
    """Slurm may set every vendor's variable on every node, or none: then the driver's device tells."""
    if ROCR in environment and CUDA not in environment:
        return True
    told = ROCR in environment or not any(name in environment for name in (*_VENDORS, OPENCL))
    return told and (places / "kfd").exists()


def _share(environment: Mapping[str, str]) -> str:
    """What kind of a part of a GPU was granted; empty for whole ones."""
    if count := _count(environment.get(SHARDS, "")):
        return f"{count} shards"
    return environment.get(names.SHARES, "")


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _shown(devices: Sequence[Device]) -> str:
    return ",".join(map(str, devices))
