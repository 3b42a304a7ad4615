"""Random small specs: a few nodes and roles, some of whose workers are awkward, and a role to be forked."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
CALM = ["plain", "graceful", "stubborn", "daemon"]
ENGINES = ["plain", "stubborn", "daemon", "hidden", "scrubbed"]
ENGINE_SHARE = 0.25  # of the runs whose first role, and what is forked beside it, host engines
AWKWARD = ["stubborn", "stopped", "daemon", "hidden", "scrubbed", "breeder", "fails", "leaves"]
SILENT = {"stopped", "fails", "leaves"}  # not asked whether they are ready: they do not stay to say so
FORKED = "side"
FIRST = "first"


@dataclass
class Draft:
    """A spec in the making; faults add to it. ``FIRST`` is a role that stays up."""

    name: str
    place: Path
    nodes: int
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    setup: str = ""
    hosts: bool = False  # whether the first role hosts engines
    isolation: str = "none"

    def role(self, name: str, kind: str, **more: Any) -> None:
        self.roles[name] = {"command": command(kind, self.place, "{worker}"), **more}

    def engine(self, name: str, kind: str, **more: Any) -> None:
        """A role of engines; who is told that its run is over has called them all the while."""
        self.hosts |= name == FIRST
        arguments = {"kind": kind, "place": str(self.place), "role": name}
        home = str(WORKER.parent)
        self.roles[name] = {"engine": "hosted:Engine", "kwargs": arguments, **more}
        if more.get("strategy", {}).get("fork", True):
            self.roles[name]["cwd"] = home

    def stubborn(self) -> None:
        """Have the first role take a while to end."""
        if self.hosts:
            self.roles[FIRST]["kwargs"]["kind"] = "stubborn"
        else:
            self.roles[FIRST]["command"] = command("stubborn", self.place, "{worker}")

    def text(self) -> str:
        """The spec; JSON is YAML."""
        spec = {
            "name": self.name,
            "nodes": self.nodes,
            "isolation": self.isolation,
            **({"setup": self.setup} if self.setup else {}),
            "local": {"gpus-per-node": 4},
            "ray": {"gpus-per-node": 4, "cpus-per-node": 2},
            "slurm": {"gpus-per-node": 4, "time": "00:30:00", **self.slurm},
            "roles": self.roles,
        }
        return json.dumps(spec, indent=1)

    def kinds(self) -> str:
        commands = {role["command"][4] for role in self.roles.values() if len(role.get("command", ())) > 4}
        engines = {f"engine:{role['kwargs']['kind']}" for role in self.roles.values() if "engine" in role}
        return " ".join(sorted(commands | engines))


def command(kind: str, place: Path, name: str, *more: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(WORKER), kind, str(place), name, *more]


def draw(
    dice: random.Random, place: Path, *, name: str = "chaos", engines: bool = False, isolation: str = "none"
) -> Draft:
    """A spec of the dice's making; ``engines``: one that hosts some for sure."""
    draft = Draft(name, place, nodes=dice.randint(1, 3), isolation=isolation)
    if dice.random() < ENGINE_SHARE or engines:
        draft.engine(FIRST, dice.choice(ENGINES), **_count(dice), **_ways(dice, patient=False), gpus=1)
    else:
        draft.role(FIRST, dice.choice(CALM), **_count(dice), **_ways(dice, patient=True), gpus=1)
    for number in range(dice.randint(0, 2)):
        kind = dice.choice(AWKWARD)
        calm = kind not in SILENT
        draft.role(f"role{number}", kind, **_count(dice), **_ways(dice, patient=calm), on_failure="ignore")
    kind = dice.choice([*CALM, "hidden", "scrubbed", "stopped"])
    strategy = {"type": "colocation", "target": FIRST}
    if draft.hosts and dice.random() < 0.7:
        _beside(dice, draft, strategy)
    else:
        draft.role(FORKED, kind, **_ways(dice, patient=kind not in SILENT), strategy=strategy, autostart=False)
    if dice.random() < 0.2:
        draft.roles[FIRST]["main"] = True
    return draft


def _beside(dice: random.Random, draft: Draft, strategy: dict[str, Any]) -> None:
    """Engines beside engines: in processes of their own, or in the same."""
    if fork := dice.random() < 0.6:
        draft.engine(FORKED, dice.choice(ENGINES), **_ways(dice, patient=False), strategy=strategy, autostart=False)
    else:
        strategy = {**strategy, "fork": fork}
        draft.engine(FORKED, "plain", stop={"grace": 0.5}, strategy=strategy, autostart=False)


def _count(dice: random.Random) -> dict[str, Any]:
    return {"per_node": dice.randint(1, 2)} if dice.random() < 0.5 else {"replicas": dice.randint(1, 3)}


def _ways(dice: random.Random, *, patient: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"stop": {"grace": round(dice.uniform(0.2, 1.5), 1)}}
    ready = dice.choice([None, {"notify": True}, {"tcp": True}]) if patient else None
    if ready:
        found["ready"] = {**ready, "timeout": 60}
    if ready and "tcp" in ready:
        found["ports"] = 1
    if (policy := dice.choice(["never", "on-failure", "always"])) != "never":
        found["restart"] = {"policy": policy, "max": dice.randint(1, 3), "backoff": round(dice.uniform(0, 0.5), 1)}
    return found
