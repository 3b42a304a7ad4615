"""Preflight, as the head sees it: every node is looked at before anything is started, and what was found is told.

The agents look; here it is decided whether the run may go on.
"""

from __future__ import annotations

import logging

from slurmfork.errors import Refused, SlurmforkError
from slurmfork.head.members import Members
from slurmfork.head.table import Table
from slurmfork.orders import Finding

log = logging.getLogger(__name__)

PATIENCE = 20.0  # an agent bounds each of its looks itself
_SHOWN = 3


async def preflight(members: Members, table: Table, *, refuse: bool) -> None:
    """Have all nodes looked at, and tell; raises Refused where something serious was found and ``refuse`` says so."""
    bodies = {member.node: None for member in members.sorted()}
    answers = await members.ask_each("preflight", bodies, list[Finding], timeout=PATIENCE)
    serious: list[str] = []
    for node, answer in answers.items():
        findings = answer
        if isinstance(findings, SlurmforkError):
            findings = [Finding(kind="preflight", text=f"nobody looked at this node: {answer}")]
        for finding in findings:
            _tell(table, node, finding)
            if finding.serious:
                serious.append(f"node {node}: {finding.text}")
    if refuse and serious:
        more = f"; and {len(serious) - _SHOWN} more" if len(serious) > _SHOWN else ""
        words = "; ".join(serious[:_SHOWN]) + more
        raise Refused(f"preflight found {words}; with `preflight: warn` the run starts all the same", "preflight")


def _tell(table: Table, node: str, finding: Finding) -> None:
    log.warning("node %s: %s", node, finding.text)
    table.nodes[node].notes.append(finding.text)
    table.event("preflight", state="serious" if finding.serious else "note", node=node, message=finding.text)
