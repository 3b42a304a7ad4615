"""For tests of ``isolation: namespace``: agents whose workers are in one, who is in there, and other users to be."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent_rig import Rig

from slurmfork import process
from slurmfork.names import ISOLATION
from slurmfork.process import Identity

ROOT = Path(__file__).resolve().parent.parent


def may_make_namespaces() -> bool:
    """Whether this machine lets this user; these tests have nothing to look at where it does not."""
    ways: list[list[str]] = [[], ["--user"]]  # root may without a user namespace, as a rule
    commands = [["unshare", *way, "--pid", "--fork", "--mount-proc", "true"] for way in ways]
    return any(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)


async def isolated(rig: Rig, **options: object) -> None:
    """An agent whose workers are in a namespace."""
    end = await rig.agent(**{ISOLATION: "namespace", **options})
    assert (end.join.guarantee, end.join.no_namespace) == ("namespace", "")


def inside(rig: Rig, node: str = "n0") -> dict[int, Identity]:
    """All that runs below the agent in a namespace: by the PIDs in there, who it is out here. init is 1."""
    agent = rig.agents[node].join.agent_pid
    found = {}
    for one in process.descendants(agent):
        pids = pids_of(one.pid)
        if len(pids) > 1:
            found[pids[-1]] = one
    return found


def pids_of(pid: int) -> list[int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return []
    return [int(word) for line in lines if line.startswith("NSpid:") for word in line.split()[1:]]


def in_namespace(name: str) -> list[str]:
    """All that is in a PID namespace, whoever's child it is; ``name`` as /proc/PID/ns/pid links to it."""
    found = []
    for pid in process.pids():
        one = process.identify(pid)
        if one is not None and process.alive(one) and space_of(pid) == name:
            found.append(process.describe(one))
    return found


def space_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def as_nobody(directory: Path, *more: Path, group: str = "") -> list[str]:
    """A command that runs the next one as another user, for whom root's own Python is not out of reach, nor ``more``.

    ``group``: a supplementary one of his.
    """
    home = Path.home()
    bound = [path for path in (Path(sys.base_prefix), *more) if path.is_relative_to(home)]
    lines = "set -e\n"
    for number, path in enumerate(bound):
        lines += f"mkdir {directory}/bound{number}; mount --bind {path} {directory}/bound{number}\n"
    if bound:
        lines += f"mount -t tmpfs -o mode=755 none {home}\n"
    for number, path in enumerate(bound):
        lines += f"mkdir -p {path}; mount --bind {directory}/bound{number} {path}\n"
    groups = f"--groups {group}" if group else "--clear-groups"
    lines += f'exec setpriv --reuid nobody --regid nogroup {groups} "$@"'
    return ["unshare", "--mount", "sh", "-c", lines, "sh"]


def again(under: Sequence[str], commons: Path, file: str, *options: str, **environment: str) -> None:
    """Run the tests of a file once more, as whom the command ``under`` makes of one."""
    plugins = ["-p", "no:cacheprovider", "--basetemp", str(commons / "tests")]
    done = subprocess.run(
        [*under, sys.executable, "-m", "pytest", "-q", "-x", *plugins, file, *options],
        env={**os.environ, "HOME": str(commons), "TMPDIR": str(commons), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, f"none of it was run: {done.stdout[-2000:]}"


@contextlib.contextmanager
def common() -> Iterator[Path]:
    """A directory where anybody may make files, in which anybody may get to."""
    path = Path(tempfile.mkdtemp(prefix="slurmfork-commons-"))
    path.chmod(0o1777)
    try:
        yield path
    finally:
        shutil.rmtree(path)
