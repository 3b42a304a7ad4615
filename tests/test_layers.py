"""The house's plan: imports point one way, and what must start fast imports little."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["aiohttp", "click", "cryptography", "jinja2", "paramiko", "psutil", "ray", "rich", "yaml"]


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that a fresh Python has after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_the_agent_imports_nothing_heavy() -> None:
    assert not loaded_by("import slurmfork.agent.main").intersection(HEAVY)


def test_the_guardian_imports_no_third_party_at_all() -> None:
    loaded = loaded_by("import slurmfork.agent.guardian")
    assert not loaded.intersection([*HEAVY, "msgspec", "uvloop", "asyncio", "logging", "subprocess"])


def test_an_engines_host_imports_nothing_heavy() -> None:
    loaded = loaded_by("import slurmfork.engine.host")
    assert not loaded.intersection([*HEAVY, "numpy", "pickle", "http.client", "slurmfork.spec", "slurmfork.messages"])


def test_help_imports_nothing_of_the_verbs() -> None:
    loaded = loaded_by("from slurmfork.cli.main import main\nmain(['--help'])")
    assert not loaded.intersection([*HEAVY[4:], "aiohttp", "cryptography", "jinja2", "msgspec", "ssl"])


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("slurmfork.spec.reader", ["slurmfork.backends", "slurmfork.run", "slurmfork.cli", "slurmfork.head"]),
        ("slurmfork.plan", ["slurmfork.backends", "slurmfork.run", "slurmfork.rundir", "slurmfork.head"]),
        ("slurmfork.journal", ["slurmfork.run", "slurmfork.spec", "slurmfork.agent", "slurmfork.head"]),
        ("slurmfork.agent.main", ["slurmfork.run", "slurmfork.head", "slurmfork.cli", "slurmfork.plan"]),
        ("slurmfork.head.main", ["slurmfork.cli", "slurmfork.run", "slurmfork.agent", "slurmfork.client"]),
        ("slurmfork.engine.host", ["slurmfork.run", "slurmfork.agent", "slurmfork.head", "slurmfork.engine.caller"]),
        ("slurmfork.engine.role", ["slurmfork.run", "slurmfork.agent", "slurmfork.head", "slurmfork.cli"]),
        ("slurmfork.run", ["slurmfork.cli", "slurmfork.agent", "slurmfork.head"]),
    ],
)
def test_imports_point_one_way(module: str, forbidden: list[str]) -> None:
    loaded = loaded_by(f"import {module}")
    found = [name for name in loaded for room in forbidden if name == room or name.startswith(room + ".")]
    assert found == []
