"""What the nodes of a run look like by the spec's own words: how many, and GPUs and CPUs of each. Pure."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from slurmfork.spec.model import Spec

_COUNTED = re.compile(r"(?:[^:,()]+:)?([0-9]{1,6})")
_GPU = re.compile(r"(?:gres[:/])?gpu(?::[0-9]*[^:,()0-9][^:,()]*)?(?::([0-9]{1,6}))?(?:\([^)]*\))?")
_SHARE = re.compile(r"(?:gres[:/])?(?:shard|mps)(?:[:(]|$)")
_GPU_LIKE = re.compile(r"(?:gres[:/])?gpu(?:[:(]|$)")


class Shape(Struct, frozen=True):
    """None: the spec does not say."""

    nodes: int | None = None
    gpus: int | None = None
    cpus: int | None = None


def node_shape(spec: Spec) -> Shape:
    """The shape of the nodes that a spec asks for; raises ValueError where its options cannot be read.

    GPUs come from slurm.gpus-per-node or slurm.gres, CPUs from slurm.cpus-per-task (there is one task a node,
    the agent) or cpus-per-gpu; for the backends local and ray from their own sections first.
    """
    gpus, cpus = gpus_of(spec.slurm), cpus_of(spec.slurm)
    if spec.backend == "local":
        cpus = spec.local.cpus_per_node  # this machine is not what the partition is
        gpus = gpus if spec.local.gpus_per_node is None else spec.local.gpus_per_node
    if spec.backend == "ray":
        cpus = spec.ray.cpus_per_node
        gpus = gpus if spec.ray.gpus_per_node is None else spec.ray.gpus_per_node
    return Shape(spec.nodes, gpus, cpus)


def gpus_of(options: dict[str, Any]) -> int | None:
    """GPUs of a node by the options of sbatch: ``gpus-per-node: a100:8``, or ``gres: gpu:8``."""
    if "gpus-per-node" in options:
        return sum(_counted(part) for part in _parts(options["gpus-per-node"]))
    found = [_gres(part) for part in _parts(options.get("gres", "")) if _GPU_LIKE.match(part)]
    return sum(found) if found else None


def shares_of(options: dict[str, Any]) -> list[str]:
    """What the options of sbatch ask for of GPUs that are shared with others' jobs: ``gres: shard:2``, or mps."""
    return [part for part in _parts(options.get("gres", "")) if _SHARE.match(part)]


def cpus_of(options: dict[str, Any]) -> int | None:
    """CPUs of a node by the options of sbatch."""
    if "cpus-per-task" in options:
        return _counted(str(options["cpus-per-task"]))
    gpus = gpus_of(options)
    if "cpus-per-gpu" in options and gpus:
        return gpus * _counted(str(options["cpus-per-gpu"]))
    return None


def _parts(value: object) -> list[str]:
    """The parts of a list of options, which may be one text or a list; commas in parentheses part nothing."""
    text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return [part.strip() for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _gres(part: str) -> int:
    if match := _GPU.fullmatch(part):
        return int(match[1] or 1)
    raise ValueError(f"{part!r} is not gpu:number, or gpu:type:number as in gpu:a100:8")


def _counted(part: str) -> int:
    if match := _COUNTED.fullmatch(part.strip()):
        return int(match[1])
    raise ValueError(f"{part!r} is not a number, or type:number as in a100:8")
