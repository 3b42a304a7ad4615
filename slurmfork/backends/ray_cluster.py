"""Getting at a cluster of Ray's: one that runs, by its address, or one that is started on this machine for the run."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from slurmfork import devices
from slurmfork.agent.grant import CUDA
from slurmfork.errors import PlanError

CONNECT_S = 10.0


class NoNodes(Exception):
    """Ray has no such nodes, and why."""


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


def say(text: str) -> None:
    """A line for the batch log."""
    print(f"slurmfork: {text}", file=sys.stderr, flush=True)
