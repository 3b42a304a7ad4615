"""The record of a run's nodes on Ray, ``ray.json`` in the run directory: which of Ray's nodes each one is.

Written by the driver, read by who wants to run something on a node: the sweep, and probes.
"""

from __future__ import annotations

import os

from msgspec import Struct, field

from slurmfork.process import boot_id
from slurmfork.rundir import RunDir


class Place(Struct, kw_only=True):
    """One node. ``machine`` tells machines apart, and containers by their processes' namespace."""

    node_id: str
    address: str
    host: str
    machine: str


class RayRecord(Struct, kw_only=True):
    """``address``: of the cluster, as for ray.init()."""

    version: int = 1
    address: str = ""
    nodes: dict[str, Place] = field(default_factory=dict)


def read(rundir: RunDir) -> RayRecord:
    """The record; an empty one before there is any. Raises RunDirError if it is damaged."""
    return rundir.read_record(rundir.path / "ray.json", RayRecord) or RayRecord()


def write(rundir: RunDir, record: RayRecord) -> None:
    """Keep it."""
    rundir.write_record(rundir.path / "ray.json", record)


def this_machine() -> str:
    """As ``Place.machine`` has it."""
    return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
