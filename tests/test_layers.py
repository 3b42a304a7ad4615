"""The house's plan: imports point one way, and what must start fast imports little."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

TOML = ["tomllib", "tomli"]
HEAVY = [
    "aiohttp",
    "click",
    "cryptography",
    "jinja2",
    "packaging",
    "paramiko",
    "pathspec",
    "psutil",
    "ray",
    "rich",
    "yaml",
]


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
    assert not loaded.intersection([*(set(HEAVY) - {"click"}), "msgspec", "ssl", *TOML])


def test_paramiko_is_for_ssh_connections_alone(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[clusters.here]\nhost = "localhost"\n')
    loaded = loaded_by(
        f"import os; os.environ.update(HOME={str(tmp_path)!r}, SLURMFORK_CONFIG={str(tmp_path / 'config.toml')!r})\n"
        "from slurmfork import clusters\nfrom slurmfork.remote.transport import run\n"
        "from slurmfork.cli.main import main\nmain(['cluster', 'list'])\n"
        "run(clusters.transport_of('here', clusters.find('here')), ['true'])"
    )
    assert "slurmfork.remote.local" in loaded
    assert not loaded.intersection(["paramiko.transport", "cryptography"])


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("slurmfork.spec.reader", ["slurmfork.backends", "slurmfork.run", "slurmfork.cli", "slurmfork.head"]),
        ("slurmfork.plan", ["slurmfork.backends", "slurmfork.run", "slurmfork.rundir", "slurmfork.head"]),
        ("slurmfork.journal", ["slurmfork.run", "slurmfork.spec", "slurmfork.agent", "slurmfork.head"]),
        ("slurmfork.clusters", ["slurmfork.cli", "slurmfork.run", "slurmfork.head", "slurmfork.agent"]),
        ("slurmfork.remote.ssh", ["slurmfork.cli", "slurmfork.run", "slurmfork.head", "slurmfork.clusters"]),
        (
            "slurmfork.agent.main",
            ["slurmfork.run", "slurmfork.head", "slurmfork.cli", "slurmfork.plan", "slurmfork.code"],
        ),
        (
            "slurmfork.head.main",
            ["slurmfork.cli", "slurmfork.run", "slurmfork.agent", "slurmfork.client", "slurmfork.code"],
        ),
        ("slurmfork.code.provision", ["slurmfork.cli", "slurmfork.remote", "slurmfork.run", "slurmfork.backends"]),
        ("slurmfork.remote.door", ["slurmfork.code", "slurmfork.cli", "slurmfork.run"]),
        ("slurmfork.engine.host", ["slurmfork.run", "slurmfork.agent", "slurmfork.head", "slurmfork.engine.caller"]),
        ("slurmfork.engine.role", ["slurmfork.run", "slurmfork.agent", "slurmfork.head", "slurmfork.cli"]),
        ("slurmfork.run", ["slurmfork.cli", "slurmfork.agent", "slurmfork.head"]),
    ],
)
def test_imports_point_one_way(module: str, forbidden: list[str]) -> None:
    loaded = loaded_by(f"import {module}")
    found = [name for name in loaded for room in forbidden if name == room or name.startswith(room + ".")]
    assert found == []


def test_the_minicluster_needs_the_standard_library_alone_and_imports_one_way() -> None:
    scripts = Path(__file__).resolve().parent.parent / "scripts"
    graph: dict[str, set[str]] = {}
    for path in (scripts / "mini").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        graph[f"mini.{path.stem}"] = {name for name in named if name.startswith("mini.")}
        assert {name.partition(".")[0] for name in named} <= {*sys.stdlib_module_names, "mini"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises at a cycle
