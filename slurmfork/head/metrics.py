"""Metrics of a run in Prometheus' text format, made from the head's table at each request."""

from __future__ import annotations

from collections import Counter

from slurmfork.head.table import Table


def exposition(table: Table) -> str:
    """The body of GET /metrics."""
    states = Counter((view.role, str(view.state)) for view in table.workers.values())
    restarts: Counter[str] = Counter()
    for view in table.workers.values():
        restarts[view.role] += view.restarts
    lines = [
        "# HELP slurmfork_run_info The run and its state.",
        "# TYPE slurmfork_run_info gauge",
        f'slurmfork_run_info{{run_id="{table.run_id}",state="{table.state}"}} 1',
        "# HELP slurmfork_start_time_seconds When the head started, in seconds since the epoch.",
        "# TYPE slurmfork_start_time_seconds gauge",
        f"slurmfork_start_time_seconds {table.started:.3f}",
        "# HELP slurmfork_nodes Nodes whose agents joined.",
        "# TYPE slurmfork_nodes gauge",
        f"slurmfork_nodes {len(table.nodes)}",
        "# HELP slurmfork_workers Workers by role and state.",
        "# TYPE slurmfork_workers gauge",
        *(f'slurmfork_workers{{role="{r}",state="{s}"}} {n}' for (r, s), n in sorted(states.items())),
        "# HELP slurmfork_restarts_total Restarts of workers by role.",
        "# TYPE slurmfork_restarts_total counter",
        *(f'slurmfork_restarts_total{{role="{role}"}} {n}' for role, n in sorted(restarts.items())),
    ]
    return "\n".join(lines) + "\n"
