"""Identities, trees, tags and signals, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import Yard, wait_until

from slurmfork import killing, names, process
from slurmfork.process import Identity

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")
NOBODY = 65534


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


@pytest.fixture(params=["kernel's list", "scan of /proc"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees as kernels with CONFIG_PROC_CHILDREN have them, and as those without are searched."""
    if request.param == "scan of /proc":
        monkeypatch.setattr(process, "_kernel_lists_children", lambda: False)
    elif not process._kernel_lists_children():
        pytest.skip("this kernel has no lists of children")


@pytest.fixture(params=["pidfd", "no pidfd"])
def with_and_without_pidfd(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no pidfd":
        for module in (process, killing):
            monkeypatch.setattr(module, "has_pidfd", lambda: False)


def another(identity: Identity) -> Identity:
    """The same PID as it was, or will be, used by another process."""
    return identity._replace(start_time=identity.start_time - 1)


def end(yard: Yard, *, grace: float = 10, bound: float = 20) -> killing.Outcome:
    return killing.end_all(lambda: process.tagged(yard.run_id), grace=grace, bound=bound)


# --- identity ----------------------------------------------------------------------------------------------


def test_identity_agrees_with_psutil() -> None:
    me = process.identify(os.getpid())
    assert me is not None
    started = psutil.boot_time() + me.start_time / os.sysconf("SC_CLK_TCK")
    assert started == pytest.approx(psutil.Process().create_time(), abs=2)
    assert me == process.identify(os.getpid())
    assert process.alive(me)


def test_a_reaped_process_is_nobody() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert process.identify(child.pid) is None
    assert not process.is_zombie(child.pid)
    assert process.owner(child.pid) is None
    assert process.environ(child.pid) is None
    assert process.children(child.pid) == []
    assert process.descendants(child.pid) == []


def test_a_zombie_is_identified_but_not_alive() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    identity = process.identify(child.pid)
    assert identity is not None
    assert process.is_zombie(child.pid)
    assert not process.alive(identity)
    assert not process.send(identity, 0)
    assert child.pid in process.children(os.getpid())
    assert identity not in process.descendants(os.getpid())
    assert killing.wait_gone([identity], 10) == []
    child.wait()


def test_a_process_whose_first_thread_ended_is_alive(yard: Yard) -> None:
    one = yard.start("headless")
    wait_until(lambda: process.describe(one).endswith("state Z"), "the first thread to end")
    assert not process.is_zombie(one.pid)
    assert process.alive(one)
    assert one in process.descendants(os.getpid())
    assert (process.environ(one.pid) or {}).items() >= yard.tag.items()
    assert process.send(one, signal.SIGKILL)
    assert killing.wait_gone([one], 10) == []


def test_a_name_full_of_parentheses_is_read(yard: Yard, tmp_path: Path) -> None:
    trap = tmp_path / "a) R 1 (b"
    trap.symlink_to("/bin/sleep")
    child = yard.run([str(trap), "60"])
    wait_until(lambda: trap.name in process.describe(process.identify(child.pid) or Identity(0, 0, "")), "exec")
    assert os.getpid() in process.ancestors(child.pid)
    child.kill()
    child.wait()


# --- trees -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_ways")
def test_descendants_are_the_whole_tree(yard: Yard) -> None:
    top = yard.start("forks")
    whole = yard.await_all(["forks"])
    assert set(process.descendants(top.pid)) == set(whole) - {top}
    assert set(process.children(top.pid)) == {one.pid for one in whole} - {top.pid}
    assert process.descendants(os.getpid())[0] == top
    end(yard)


@pytest.mark.usefixtures("both_ways")
def test_a_child_of_another_thread_is_found() -> None:
    found: list[bool] = []

    def look() -> None:
        child = subprocess.Popen(["sleep", "60"])
        found.append(child.pid in process.children(os.getpid()))
        found.append(child.pid in [one.pid for one in process.descendants(os.getpid())])
        child.kill()
        child.wait()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_ancestors_reach_up_to_the_first_process() -> None:
    mine = process.ancestors(os.getpid())
    assert os.getppid() in mine
    assert os.getpid() not in mine
    assert 0 not in mine


# --- tags --------------------------------------------------------------------------------------------------


def test_environ_is_read_whole(yard: Yard) -> None:
    one = yard.start("plain", env={"WITH_EQUALS": "a=b", "WITH_NEWLINE": "a\nb", "NOT_UTF8": "\udcff"})
    found = process.environ(one.pid)
    assert found is not None
    assert (found["WITH_EQUALS"], found["WITH_NEWLINE"], found["NOT_UTF8"]) == ("a=b", "a\nb", "\udcff")
    yard.kill(one)


def test_both_halves_of_the_tag_are_asked_for(yard: Yard) -> None:
    run_id, node = yard.run_id, yard.node
    yard.innocent("no-node", **{names.RUN_ID: run_id})
    yard.innocent("no-run", **{names.NODE: node})
    yard.innocent("longer-run", **{names.RUN_ID: run_id + "0", names.NODE: node})
    yard.innocent("hidden-in-a-value", WORD=f"{names.RUN_ID}={run_id}", **{names.NODE: node})
    here = yard.start("plain")
    there = yard.start("plain", "there", env={**yard.tag, names.NODE: "n10"})
    assert set(process.tagged(run_id)) == {here, there}
    assert process.tagged(run_id, "n1") == [here]
    assert process.tagged(run_id, "n10") == [there]
    end(yard)
    yard.assert_innocents_live()


def test_the_job_that_a_worker_submitted_is_not_of_the_run(yard: Yard) -> None:
    ours = yard.start("plain", env={**yard.tag, "SLURM_JOB_ID": "7"})
    without = yard.start("plain", "no-job")
    other = yard.start("plain", "other-job", env={**yard.tag, "SLURM_JOB_ID": "70"})
    assert set(process.tagged(yard.run_id, job_id="7")) == {ours, without}
    assert set(process.tagged(yard.run_id)) == {ours, without, other}
    end(yard)


def test_whoever_looks_is_left_out(yard: Yard) -> None:
    code = "import sys; sys.path.append(sys.argv[1]); from slurmfork import process as p"
    code += "; print(p.tagged(sys.argv[2]))"
    root = str(Path(process.__file__).parent.parent)
    command = [sys.executable, "-c", code, root, yard.run_id]
    done = subprocess.run(command, env=yard.environment(yard.tag), capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


@needs_root
def test_processes_of_others_are_not_looked_at(yard: Yard) -> None:
    yard.directory.chmod(0o777)
    yard.directory.parent.chmod(0o755)
    child = yard.run(["sleep", "60"], user=NOBODY)
    wait_until(lambda: b"sleep" in Path(f"/proc/{child.pid}/cmdline").read_bytes(), "exec")
    assert process.owner(child.pid) == NOBODY
    assert process.tagged(yard.run_id) == []
    child.kill()
    child.wait()


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_and_without_pidfd")
def test_only_the_very_process_is_signalled(yard: Yard) -> None:
    one = yard.start("plain")
    assert not process.send(another(one), signal.SIGKILL)
    assert not process.send(one._replace(boot_id="of-another-boot"), signal.SIGKILL)
    assert not process.alive(another(one))
    assert process.alive(one)
    assert process.send(one, signal.SIGKILL)
    assert killing.wait_gone([one], 10) == []
    yard.started[0].wait()
    assert not process.send(one, signal.SIGKILL)


@pytest.mark.parametrize("pid", [0, -1])
def test_no_signal_goes_to_a_group(pid: int) -> None:
    assert not process.send(Identity(pid, 0, process.boot_id()), 0)


@pytest.mark.usefixtures("with_and_without_pidfd")
def test_wait_gone_returns_who_stays(yard: Yard) -> None:
    leaves, stays = yard.start("plain", "leaves"), yard.start("plain", "stays")
    process.send(leaves, signal.SIGKILL)
    assert killing.wait_gone([leaves, another(stays)], 10) == []
    assert killing.wait_gone([leaves, stays], 0.05) == [stays]
    end(yard)


def test_a_description_is_one_line(yard: Yard) -> None:
    child = yard.run(["sleep", "60"])
    identity = process.identify(child.pid)
    assert identity is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.describe(identity) == f"pid {child.pid} (sleep), state Z"
    child.wait()
    assert process.describe(identity) == f"pid {child.pid} (gone)"
    one = yard.start("plain", "name\nwith\x1b[2J")
    text = process.describe(one)
    assert text.startswith(f"pid {one.pid} (")
    assert text.endswith("), state S")
    assert text.isprintable()
    assert len(text) < 200
    yard.kill(one)


# --- ending many -------------------------------------------------------------------------------------------


def test_whoever_is_asked_politely_has_time(yard: Yard) -> None:
    yard.start("graceful")
    outcome = end(yard)
    assert (yard.directory / "graceful.bye").exists()
    assert len(outcome.ended) == 1
    assert outcome.survivors == []


def test_the_stopped_hear_the_request_too(yard: Yard) -> None:
    """Had they not, the whole grace would have been waited for."""
    yard.start("stopped")
    begun = time.monotonic()
    assert end(yard, grace=60).survivors == []
    assert time.monotonic() - begun < 30
    assert yard.started[0].wait(10) == -signal.SIGTERM


@pytest.mark.parametrize("kind", ["ignores-term", "forks", "hops", "breeds", "daemon", "headless"])
def test_none_escapes(yard: Yard, kind: str) -> None:
    yard.start(kind)
    assert end(yard, grace=0.05).survivors == []
    assert yard.living() == []


def test_no_signal_comes_between_freezing_and_killing(yard: Yard) -> None:
    one = yard.start("ignores-term")
    looks: list[None] = []

    def find() -> Iterator[Identity]:
        looks.append(None)
        if process.alive(one):
            yield one
        if len(looks) == 2:  # the first was to ask, this one was to freeze
            wait_until(lambda: process.describe(one).endswith("state T"), "it to be frozen")
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # who runs the tests may have other threads

    with pytest.raises(KeyboardInterrupt):
        killing.end_all(find, grace=0, bound=10)
    assert killing.wait_gone([one], 10) == []


def test_survivors_are_reported(yard: Yard) -> None:
    one = yard.start("ignores-term")
    outcome = end(yard, grace=0, bound=0)
    assert outcome.survivors == [one]
    assert outcome.ended == []
    end(yard, grace=0)
