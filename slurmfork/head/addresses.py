"""Addresses: where the head listens, and what Slurm calls its nodes on the network.

Node names need not be host names, and several nodes may share a host: Slurm's NodeAddr is the one name by which
a node is known to be reached.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping

from slurmfork.head import scheduler

LOOPBACK = "127.0.0.1"
_FIELD = re.compile(r"(?:^|\s)(NodeName|NodeAddr)=(\S+)")


async def node_addresses(environment: Mapping[str, str]) -> dict[str, str]:
    """IP address by node name for the nodes of this job; empty outside of Slurm, or where it will not tell."""
    nodelist = environment.get("SLURM_JOB_NODELIST")
    if not nodelist:
        return {}
    found: dict[str, str] = {}
    for line in (await scheduler.ask("scontrol", "-o", "show", "node", nodelist) or "").splitlines():
        fields = dict(_FIELD.findall(line))
        if (name := fields.get("NodeName")) and (address := _resolve(fields.get("NodeAddr") or name)):
            found[name] = address
    return found


def _resolve(name: str) -> str | None:
    with contextlib.suppress(OSError):
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    return None


def bind(
    addresses: Mapping[str, str], environment: Mapping[str, str], *, apart: bool = False
) -> tuple[list[str], list[socket.socket]]:
    """Two listening sockets (API, link) and the addresses at which others find them, best first.

    On this node's own NodeAddr where that is an address of this machine; outside of Slurm on loopback, or if nodes
    are ``apart``, other machines, on all addresses.
    """
    if apart:
        found = [_outward(), _resolve(socket.gethostname()), LOOPBACK]
        return list(dict.fromkeys(address for address in found if address)), [_listen(""), _listen("")]
    if "SLURM_JOB_ID" not in environment:
        return [LOOPBACK], [_listen(LOOPBACK), _listen(LOOPBACK)]
    own = addresses.get(environment.get("SLURMD_NODENAME", ""))
    if own is not None:
        with contextlib.suppress(OSError):
            return [own], [_listen(own), _listen(own)]
    names = [own, _resolve(socket.gethostname()), socket.gethostname()]
    return list(dict.fromkeys(name for name in names if name)), [_listen(""), _listen("")]


def _outward() -> str | None:
    """The address from which this machine reaches others; None without a network. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("203.0.113.1", 9))  # of a network that is for documentation alone
        return str(probe.getsockname()[0])
    return None


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.bind((address, 0))
        sock.listen(1024)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def head_variable(addresses: list[str], link: socket.socket) -> str:
    """What agents find in SLURMFORK_HEAD: ``ip:port`` for each address, comma-separated."""
    port = link.getsockname()[1]
    return ",".join(f"[{address}]:{port}" if ":" in address else f"{address}:{port}" for address in addresses)


def expected_nodes(environment: Mapping[str, str], requested: int) -> int:
    """How many agents will join: what Slurm granted, else what was requested."""
    return int(environment.get("SLURM_JOB_NUM_NODES") or requested)


def node_name(environment: Mapping[str, str]) -> str:
    """The name of the node that the head runs on."""
    return environment.get("SLURMD_NODENAME") or os.uname().nodename.split(".")[0]
