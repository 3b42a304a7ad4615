"""What the documentation says is true: links lead somewhere, verbs and options are told, examples run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Factory
from running import Shell

from slurmfork.cli.main import GROUPS, VERBS
from slurmfork.head.api import Api

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("verb", [*VERBS, *(f"{group} {verb}" for group in GROUPS for verb in GROUPS[group])])
def test_every_option_is_documented(verb: str) -> None:
    command = [sys.executable, "-m", "slurmfork", *verb.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    page = (ROOT / "docs" / "cli.md").read_text()
    section = page.partition(f"### {verb}\n")[2].partition("### ")[0]
    options = set(re.findall(r"--[a-z-]+", done.stdout))
    assert options
    assert options <= set(re.findall(r"--[a-z-]+", section)), "run scripts/clidoc"


def test_every_request_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [route.path for route in Api.routes if f"| `{route.method} {route.path}`" not in page] == []


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_are_valid(local: Shell, example: Path) -> None:
    assert local.json("validate", str(example))["ok"] is True


def test_the_controller_example(local: Shell) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "controller.py"), str(EXAMPLES / "quickstart.yaml"), "local"],
        env=local.env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "eval/3 beside rollout/3" in done.stdout
    assert "cancelled, 0 survivors" in done.stdout


@pytest.mark.parametrize("fork", ["true", "false"])
def test_the_engines_example_is_the_same_with_and_without_a_fork(local: Shell, fork: str) -> None:
    text = (EXAMPLES / "engines.yaml").read_text()
    spec = local.spec(text.replace("fork: true", f"fork: {fork}"))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "engines.py"), str(spec), "local"],
        env=local.env,
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2: 2 batches, score 0." in done.stdout
    assert "one by one: 50\nawaited: ['rested', 'rested']\nas raised there: TypeError\n0 survivors" in done.stdout
    assert "weights at the end" in next(local.root.glob("*/logs/rollout-0.log")).read_text()


def test_a_worker_forks_beside_itself(local: Shell) -> None:
    command = json.dumps([sys.executable, str(EXAMPLES / "inside.py")])
    spec = local.spec(
        f"""
        name: inside
        local: {{gpus-per-node: 1}}
        roles:
          server: {{gpus: 1, command: {command}, ready: {{notify: true}}}}
        """
    )
    run_id = local.ready(spec, "--backend", "local")
    following = local.start("logs", "-f", run_id, "server/0")
    assert following.stdout is not None
    assert "has helper/0 beside it" in following.stdout.readline()
    child = local.ps(run_id, "helper")[0]
    assert (child["target"], child["gpus"], child["state"]) == ("server/0", [0], "running")
    assert local.json("cancel", run_id)["survivors"] == 0
    following.wait(timeout=60)


@pytest.mark.slurm
@pytest.mark.timeout(180)
def test_the_grpo_example_on_slurm(minicluster: Factory, tmp_path: Path) -> None:
    cluster = minicluster(nodes=4, gpus=8)
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    run_id = shell.ready(EXAMPLES / "grpo.yaml")
    assert len(shell.json("fork", run_id, "eval")["workers"]) == 16
    rollout = shell.ps(run_id, "rollout")
    assert len({(view["node"], port) for view in rollout for port in view["ports"]}) == 16
    shell.end()
