"""The run directory's file system hangs, is full, or can only be read: no worker dies of it, and nothing is left."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import wait_until
from running import Shell

from slurmfork import names, process

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own, which needs root")

SPEC = """
    name: storage
    local: {gpus-per-node: 1}
    roles:
      rollout: {gpus: 1, stop: {grace: 2}, command: [sleep, "1000"]}
      eval:
        strategy: {type: colocation, target: rollout}
        autostart: false
        command: [sleep, "1001"]
"""


def command(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, timeout=60, capture_output=True)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """A shell whose runs are on a small file system of their own, at ``shell.root``."""
    made = Shell(tmp_path)
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 << 20)
    made.root.mkdir()
    command("mkfs.ext4", "-q", image)
    command("mount", "-o", "loop", image, made.root)
    try:
        yield made
        made.end()
    finally:
        command("umount", "--lazy", made.root)


@contextmanager
def frozen(root: Path) -> Iterator[None]:
    """Whoever writes there waits, as with a file server that is gone."""
    command("fsfreeze", "--freeze", root)
    try:
        yield
    finally:
        command("fsfreeze", "--unfreeze", root)


def test_a_file_system_that_hangs_for_a_while_hurts_nobody(shell: Shell) -> None:
    run_id = shell.ready(shell.spec(SPEC), "--backend", "local")
    before = [view["pid"] for view in shell.ps(run_id)]
    with frozen(shell.root):
        done = shell.call("fork", run_id, "eval", "--timeout", "2")
        assert done.returncode == 1
        assert "did not answer within 2 s" in done.stderr
        assert shell.status(run_id)["state"] == "ready"
        assert not shell.status(run_id)["nodes"][0]["silent"], "the agent does not hang with its disk"
    wait_until(lambda: "eval/0" not in states(shell, run_id, "running"), "the fork to be taken back")
    assert len(shell.json("fork", run_id, "eval")["workers"]) == 1
    assert [view["pid"] for view in shell.ps(run_id, "rollout")] == before


def states(shell: Shell, run_id: str, state: str) -> list[str]:
    return [view["worker"] for view in shell.ps(run_id) if view["state"] == state]


def workers(shell: Shell, run_id: str) -> list[int]:
    """PIDs of what was started for roles; an agent whose thread waits for the disk cannot end before that does."""
    return [pid for pid in shell.pids(run_id) if (process.environ(pid) or {}).get(names.WORKER)]


def test_a_cancel_ends_the_workers_while_the_file_system_hangs(shell: Shell) -> None:
    run_id = shell.ready(shell.spec(SPEC), "--backend", "local")
    with frozen(shell.root):
        cancel = shell.start("cancel", run_id, "--json")
        wait_until(lambda: not workers(shell, run_id), "the workers to be gone")
    output, words = cancel.communicate(timeout=120)
    assert '"survivors": 0' in output, words


def fill(root: Path) -> Path:
    """Leave no free block; returns the file that takes them."""
    filler = root / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], check=False, capture_output=True, timeout=60)
    return filler


def test_what_cannot_be_journaled_is_not_forked_and_all_else_goes_on(shell: Shell) -> None:
    run_id = shell.ready(shell.spec(SPEC), "--backend", "local")
    filler = fill(shell.root)
    long = "x" * 20_000  # the journal's last block may have room for a short record
    done = shell.call("fork", run_id, "probe", "--target", "rollout", "--", "sleep", "1002", long)
    assert done.returncode == 1
    assert "the journal cannot be written" in done.stderr
    assert [view["state"] for view in shell.ps(run_id, "rollout")] == ["running"]
    assert len(workers(shell, run_id)) == 1
    filler.unlink()
    assert len(shell.json("fork", run_id, "eval")["workers"]) == 1


def test_a_cancel_works_on_a_full_file_system(shell: Shell) -> None:
    run_id = shell.ready(shell.spec(SPEC), "--backend", "local")
    fill(shell.root)
    reply = shell.json("cancel", run_id)
    assert (reply["state"], reply["survivors"]) == ("cancelled", 0)
    assert shell.left(run_id) == []
