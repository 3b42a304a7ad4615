"""Isolation, as the head sees it: which nodes give the namespace that a run asks for, and whether it may do without."""

from __future__ import annotations

import logging

from slurmfork.errors import Refused
from slurmfork.head.members import Members
from slurmfork.head.table import Table

log = logging.getLogger(__name__)

_SHOWN = 3


def check(members: Members, table: Table, *, required: bool) -> None:
    """Tell which nodes have no namespace, and why; raises Refused where that is ``required``."""
    lacking = {member.node: member.join.no_namespace for member in members.sorted() if member.join.no_namespace}
    for node, why in lacking.items():
        guarantee = table.nodes[node].guarantee
        message = f"no PID namespace here, its guarantee is {guarantee}: {why}"
        log.warning("node %s: %s", node, message)
        table.nodes[node].notes.append(message)
        table.event("isolation", state=guarantee, node=node, message=message)
    if required and lacking:
        words = "; ".join(f"node {node}: {why}" for node, why in list(lacking.items())[:_SHOWN])
        more = f"; and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise Refused(f"`isolation: namespace` is not to be had: {words}{more}", "isolation")
