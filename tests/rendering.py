"""Batch scripts for tests: any value in any place, and run with a harmless package in the place of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from slurmfork.plan import Request
from slurmfork.render import render
from slurmfork.spec import Role, Spec

# What a value must survive in any place of a script. CANARY stands for a file that must never appear.
HOSTILE = {
    "spaces": "two words  and more ",
    "quotes": "it's \"quoted\" '\"'\"'",
    "substitution": "$(touch CANARY)`touch CANARY`${PATH}$PATH",
    "commands": "; touch CANARY; | touch CANARY & touch CANARY >CANARY",
    "backslashes": "\\ \\\\ \\$(touch CANARY) \\",
    "comment": "# touch CANARY #",
    "directive": "x --wrap=\"touch CANARY\" #SBATCH --wrap='touch CANARY'",
    "dashes": "--run-dir=-x -rf",
    "unicode": "ünï ✓ 名前",
    "controls": "tab\there \x01\x7f\x1b[31m",
    "glob": "* ? [a-z] {a,b} ~ !!",
    "template": "{{ 1 }} {% endraw %} {# #}",
    "long": "x" * 10_000,
}
LINE_BREAKS = {
    "newline": "a\ntouch CANARY\n#SBATCH --wrap='touch CANARY'\n",
    "carriage": "a\r\ntouch CANARY\r\n",
    "here": "END_OF_SETUP\ntouch CANARY\nEOF",
}

HEAD = """
import json, os, signal, sys, time
told = []
def hear(number, frame):
    told.append(number)
    open(os.path.join(run_dir, "told." + signal.Signals(number).name), "w").close()
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, hear)
run_dir = os.environ["SLURMFORK_RUN_DIR"]
with open(os.path.join(run_dir, "end.json"), "w") as file:
    file.write("{}")
with open(os.path.join(run_dir, "head.out"), "w") as file:
    json.dump({"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid()}, file)
os.rename(os.path.join(run_dir, "head.out"), os.path.join(run_dir, "head.seen"))
want = [signal.Signals[name] for name in os.environ.get("HEAD_AWAITS", "").split()]
end = time.monotonic() + 60
while want and not all(told.count(one) >= want.count(one) for one in want) and time.monotonic() < end:
    time.sleep(0.01)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})  # a leaving Python forgets its handlers
os._exit(int(os.environ.get("HEAD_STATUS", "0")))
"""
SWEEP = """
import json, os, sys
with open(os.path.join(os.environ["SLURMFORK_RUN_DIR"], "swept"), "a") as file:
    json.dump(sys.argv[1:], file)
    file.write("\\n")
print("{}")
"""


def make_spec(backend: str = "slurm", **given: Any) -> Spec:
    values = {"name": "grpo", "roles": {"rollout": Role(command="true")}, **given}
    return Spec(backend=backend, **values)


def script_of(spec: Spec, run_dir: Path = Path("/shared/runs/grpo-abc234"), **given: Any) -> str:
    """The script as `submit` has it rendered, but for what is given."""
    values: dict[str, Any] = {
        "run_id": "grpo-abc234",
        "run_dir": run_dir,
        "request": Request(nodes=2, gpus_per_node=8, cpus_per_node=16),
        "python": "/opt/venv/bin/python",
        "package": Path("/opt/venv/lib/python3.11/site-packages/slurmfork"),
    }
    return render(spec, **{**values, **given})


class Stage:
    """A run directory, an interpreter and a stand-in package, at any paths; runs scripts there for real."""

    def __init__(self, home: Path, name: str = "stage") -> None:
        self.home = home / name
        self.run_dir = self.home / "run"
        self.package = self.home / "package"
        self.python = self.home / "python"
        (self.package / "head").mkdir(parents=True)
        (self.package / "head" / "__main__.py").write_text(HEAD)
        (self.package / "sweep.py").write_text(SWEEP)
        self.run_dir.mkdir()
        self.python.symlink_to(sys.executable)

    def script(self, spec: Spec, **given: Any) -> Path:
        """Render a spec for this stage, and write its batch script."""
        values = {"python": str(self.python), "package": self.package, **given}
        path = self.run_dir / "batch.sh"
        path.write_text(script_of(spec, self.run_dir, **values))
        return path

    def start(self, spec: Spec, *, env: dict[str, str] | None = None, **given: Any) -> subprocess.Popen[str]:
        """Start the batch script as Slurm does, with a shell in a session of its own."""
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SRUN"))}
        return subprocess.Popen(
            ["bash", str(self.script(spec, **given))],
            env={**own, **(job if spec.backend == "slurm" else {}), **(env or {})},
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, spec: Spec, **given: Any) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        process = self.start(spec, **given)
        try:
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    @property
    def seen(self) -> dict[str, Any]:
        """What the head saw: argv, env, cwd, pid."""
        found: dict[str, Any] = json.loads((self.run_dir / "head.seen").read_text())
        return found

    @property
    def launcher_and_sweep(self) -> tuple[list[str], list[str]]:
        """The two command lines that the head was given."""
        words = self.seen["argv"]
        words = words[words.index("--") + 1 :]
        end = words.index("--sweep")
        return words[:end], words[end + 1 :]

    @property
    def started(self) -> bool:
        return (self.run_dir / "head.seen").exists()

    @property
    def status(self) -> int:
        return int((self.run_dir / "batch.status").read_text())

    @property
    def swept(self) -> list[list[str]]:
        path = self.run_dir / "swept"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checked(script: str, directory: Path, *, values: bool = False) -> None:
    """Fails where bash cannot read the script, or shellcheck finds anything to say about it.

    ``values``: not where it wonders whether a value in single quotes was meant to be expanded.
    """
    path = directory / "checked.sh"
    path.write_text(script)
    wonders = ["--exclude=SC2016,SC1003"] if values else []
    for argv in (["bash", "-n"], ["shellcheck", "--shell=bash", *wonders]):
        assert shutil.which(argv[0]), f"{argv[0]} is not installed"
        done = subprocess.run([*argv, str(path)], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr
