"""The specs of these runs. Every process of one sleeps for `mark` seconds, which is how it is found."""

from __future__ import annotations

from typing import Any

from beds.bed import Bed

HEAD = """\
name: bed
nodes: 2
slurm: {{gpus-per-node: 2, {options}}}
roles:
"""
ROLES = """\
  first:
    per_node: 1
    gpus: 1
    command: "sleep {mark} & exec sleep {mark}"
  stray:
    per_node: 1
    command: "env -i setsid -f sleep {mark}; exec sleep {mark}"
  second:
    strategy: {{type: colocation, target: first}}
    autostart: false
    command: [sleep, "{mark}"]
  third:
    strategy: {{type: colocation, target: second}}
    autostart: false
    command: [sleep, "{mark}"]
"""


def _options(time: str, partition: str) -> str:
    return ", ".join([f'time: "{time}"', *([f"partition: {partition}"] if partition else [])])


def spec(mark: int, *, time: str = "01:00:00", partition: str = "", requeue: bool = False) -> str:
    """Two workers a node, one with a child, one with a daemon that has nothing of its parent's environment."""
    head = "requeue: true\n" * requeue + HEAD
    return head.format(options=_options(time, partition)) + ROLES.format(mark=mark)


def restarting_spec(mark: int) -> str:
    restart = "    restart: {policy: on-failure, max: 3}\n"
    return spec(mark).replace("  stray:", f"{restart}  stray:")


def main_spec(mark: int, status: int) -> str:
    """A main role that ends by itself, beside workers that do not."""
    main = f"""\
  main:
    replicas: 1
    main: true
    command: "sleep 1; exit {status}"
"""
    return spec(mark) + main


def forked(bed: Bed, run_id: str, role: str, target: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = bed.json("fork", run_id, role, "--target", target)["workers"]
    return found
