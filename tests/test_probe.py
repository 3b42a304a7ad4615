"""The plain reader of /proc under the shells that there are, and what is made of its answer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Yard, wait_until

from slurmfork import names, nodelook, probe, process
from slurmfork.journal import Ended, Intent, Journal, Record, Seen, Started
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.nodelook import Look
from slurmfork.probe import Verdict, WorkerProbe
from slurmfork.process import Identity
from slurmfork.recorded import Recorded, read_journal
from slurmfork.rundir import RunDir

SHELLS = [["sh"], ["dash"], ["bash", "--posix"], ["busybox", "sh"], ["mksh"], ["ksh"], ["zsh", "--emulate", "sh"]]
HOUR = 3600.0


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as made:
        yield made


def look(pids: set[int], run_id: str, shell: list[str] | None = None, *, path: str | None = None) -> Look:
    script = nodelook.script(pids, run_id, "the-mark")
    env = {"PATH": path or os.environ["PATH"]}
    done = subprocess.run(shell or ["sh"], input=script, capture_output=True, timeout=60, env=env, check=True)
    found = nodelook.read(done.stdout, run_id, "the-mark")
    assert found is not None, done
    return found


@pytest.mark.parametrize("shell", SHELLS, ids=[shell[0] for shell in SHELLS])
def test_every_shell_tells_the_same(yard: Yard, shell: list[str]) -> None:
    if shutil.which(shell[0]) is None:
        pytest.skip(f"there is no {shell[0]} here")
    asked = yard.start("plain", "asked")
    stray = yard.start("plain", "stray", env={**yard.tag, names.WORKER: "rollout/3", "ODD": "a\nSLURMFORK_NODE=fake"})
    yard.start("plain", "alike", env={**yard.tag, names.RUN_ID: yard.run_id + "x", names.WORKER: "a/0"})
    found = look({asked.pid, 2**31 - 1}, yard.run_id, shell)
    assert (found.boot_id, found.uid, found.complete) == (process.boot_id(), os.geteuid(), True)
    assert found.stats[asked.pid].start_time == asked.start_time
    assert set(found.stats) == {1, asked.pid}
    [tagged] = [one for one in found.tagged if one.pid != asked.pid]
    assert (tagged.pid, tagged.stat.start_time, tagged.owner) == (stray.pid, stray.start_time, os.geteuid())
    assert (tagged.node, tagged.environment[names.WORKER]) == ("n1", "rollout/3")
    assert os.getpid() in tagged.above
    assert "awkward.py" in tagged.command
    yard.kill(asked, stray, yard.await_one("alike"))


def test_busybox_tools_alone_do(yard: Yard, tmp_path: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("there is no busybox here")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("cat", "grep", "id", "sh", "tr", "uname", "xargs"):
        (tools / name).symlink_to(busybox)
    stray = yard.start("plain", "stray", env={**yard.tag, names.WORKER: "rollout/3"})
    found = look(set(), yard.run_id, [str(tools / "sh")], path=str(tools))
    assert [one.pid for one in found.tagged] == [stray.pid]
    assert found.booted > 0
    yard.kill(stray)


def test_a_grep_that_knows_no_nul_does(yard: Yard, tmp_path: Path) -> None:
    grep = tmp_path / "grep"
    grep.write_text(f'#!/bin/sh\ncase $1 in -*z*) exit 2 ;; esac\nexec {shutil.which("grep")} "$@"\n')
    grep.chmod(0o755)
    stray = yard.start("plain", "stray", env={**yard.tag, names.WORKER: "rollout/3"})
    found = look(set(), yard.run_id, path=f"{tmp_path}:{os.environ['PATH']}")
    assert [one.pid for one in found.tagged] == [stray.pid]
    yard.kill(stray)


def test_a_name_with_anything_in_it_does_not_mislead(yard: Yard, tmp_path: Path) -> None:
    program = tmp_path / "a) R 1\nstat 1 (x"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    child = yard.run([str(program), "1000"])
    wait_until(lambda: b"stat 1" in Path(f"/proc/{child.pid}/comm").read_bytes(), "the program to be there")
    found = look({child.pid}, yard.run_id)
    one = process.identify(child.pid)
    assert one is not None
    assert found.stats[child.pid].start_time == one.start_time
    assert found.stats[1].comm != "x"
    yard.kill(one)


def test_what_was_said_before_the_search_hung_counts() -> None:
    done = subprocess.run(["sh"], input=nodelook.script([os.getpid()], "r", "m"), capture_output=True, check=True)
    looked = done.stdout.index(b"m looked\n") + len(b"m looked\n")
    found = nodelook.read(b"Welcome!\n" + done.stdout[:looked], "r", "m")
    assert found is not None
    assert os.getpid() in found.stats
    assert not found.complete
    assert probe.agent_of("n1", found)[0] is Verdict.UNKNOWN
    assert nodelook.read(done.stdout[: looked - 2], "r", "m") is None
    assert nodelook.read(done.stdout, "r", "another-mark") is None


# --- verdicts


def started(one: Identity, worker: str = "a/0", start_id: str = "s1", *, time: float = 1000.0) -> Started:
    return Started(
        start_id=start_id, worker=worker, pid=one.pid, start_time=one.start_time, boot_id=one.boot_id,
        uid=os.geteuid(), argv=["x"], time=time,
    )  # fmt: skip


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "demo-abc234")
    made.make()
    return made


def recorded(rundir: RunDir, *records: Record) -> Recorded:
    journal = Journal(rundir.journal("n1"))
    journal.append(*records)
    journal.close()
    return read_journal(rundir, "n1")


def verdict(known: Recorded, seen: Look | None = None, why: str = "") -> WorkerProbe:
    [found] = probe.judge(known, seen or (None if why else look(known.pids(), "demo-abc234")), why)
    return found


def test_alive_gone_and_not_ours(yard: Yard, rundir: RunDir) -> None:
    one = yard.start("plain")
    assert verdict(recorded(rundir, started(one))).verdict is Verdict.ALIVE
    process.send(one, signal.SIGSTOP)
    wait_until(lambda: "stopped" in verdict(read_journal(rundir, "n1")).reason, "the process to be stopped")
    earlier = one._replace(start_time=one.start_time - 1)
    found = verdict(recorded(rundir, started(earlier, start_id="s2")))
    assert (found.verdict, found.pid) == (Verdict.NOT_OURS, one.pid)
    yard.kill(one)
    found = verdict(recorded(rundir, started(one, start_id="s3")))
    assert (found.verdict, found.ended) == (Verdict.GONE, False)
    assert "nobody has reaped it" in found.reason


@pytest.mark.parametrize("ahead", [-HOUR, 0.0, HOUR])
def test_no_clock_has_to_be_right(yard: Yard, rundir: RunDir, ahead: float) -> None:
    one = yard.start("plain")
    seen = look({one.pid}, "demo-abc234")
    known = recorded(rundir, started(one, time=seen.booted + one.start_time / 100 + ahead))
    assert verdict(known, seen._replace(booted=seen.booted - 2 * ahead)).verdict is Verdict.ALIVE
    yard.kill(one)


def test_another_boot(yard: Yard, rundir: RunDir) -> None:
    """A node that was restarted since has nothing of it; one that ran before, in a boot of its own, is another."""
    one = yard.start("plain")
    seen = look({one.pid}, "demo-abc234")
    known = recorded(rundir, started(one._replace(boot_id="of-another-boot"), time=seen.booted - 5))
    found = verdict(known, seen)
    assert (found.verdict, found.reason) == (Verdict.GONE, "n1 was restarted since")
    known = recorded(rundir, started(one._replace(boot_id="of-another-boot"), time=seen.booted + 5))
    found = verdict(known, seen)
    assert found.verdict is Verdict.UNKNOWN
    assert f"{seen.host}, which answers as n1, is not the machine" in found.reason
    yard.kill(one)


def test_a_recorded_end_needs_no_answer_but_what_it_left_is_told(yard: Yard, rundir: RunDir) -> None:
    one, child = yard.start("plain"), yard.start("plain", "child")
    below = Seen(worker="a/0", processes=[(child.pid, child.start_time), (one.pid, 17)])
    end = Ended(start_id="s1", worker="a/0", pid=one.pid, exit_status=3)
    known = recorded(rundir, started(one), below, end)
    found = verdict(known, None, "ssh: refused")
    assert (found.verdict, found.ended, found.reason) == (Verdict.GONE, True, "its end is recorded: exit status 3")
    found = verdict(known)
    assert found.left == [child.pid]
    assert found.reason.endswith(f"; pid {child.pid} of its processes is left")
    again = recorded(rundir, started(one, start_id="s2"))
    assert verdict(again, None, "ssh: refused").reason == "ssh: refused"
    yard.kill(one, child)


def test_a_start_that_was_only_announced(yard: Yard, rundir: RunDir) -> None:
    known = recorded(rundir, Intent(start_id="s1", worker="a/0", argv=["x"]))
    tag = {names.RUN_ID: "demo-abc234", names.NODE: "n1", names.WORKER: "a/0"}
    one = yard.start("plain", env=tag)
    found = verdict(known)
    assert (found.verdict, found.pid) == (Verdict.UNKNOWN, None)
    assert f"pid {one.pid} may be it" in found.reason
    [stray] = probe.unrecorded(known, look(set(), "demo-abc234"), None)
    assert (stray.worker, stray.pid) == ("a/0", one.pid)
    yard.kill(one)
    wait_until(lambda: verdict(known).verdict is Verdict.GONE, "nothing to carry its name")


def test_what_is_below_a_recorded_process_is_not_unrecorded(yard: Yard, rundir: RunDir) -> None:
    myself = process.identify(os.getpid())
    assert myself is not None
    tag = {names.RUN_ID: "demo-abc234", names.NODE: "n1", names.WORKER: "a/0"}
    one = yard.start("plain", env=tag)
    other_job = yard.start("plain", "other", env={**tag, "SLURM_JOB_ID": "8"})
    nothing, mine = Recorded(node="n1"), recorded(rundir, started(myself))
    seen = look(set(), "demo-abc234")
    assert {stray.pid for stray in probe.unrecorded(nothing, seen, None)} == {one.pid, other_job.pid}
    assert [stray.pid for stray in probe.unrecorded(nothing, seen, "7")] == [one.pid]
    assert probe.unrecorded(Recorded(node="n2"), seen, "7") == []
    assert probe.unrecorded(mine, look(mine.pids(), "demo-abc234"), "7") == []
    yard.kill(one, other_job)


def test_journals_that_are_not_to_be_believed_are_told(rundir: RunDir) -> None:
    assert read_journal(rundir, "n1").notes == ["n1 has no journal"]
    with rundir.journal("n1").open("w") as file:
        file.write('nonsense\n{"op":"seen"}\n')
    rundir.journal("n1").chmod(0o600)
    assert read_journal(rundir, "n1").notes == ["the journal of n1 has 2 damaged lines"]
    rundir.journal("n1").chmod(0o666)
    assert "can be written to by others" in read_journal(rundir, "n1").uncertain
    rundir.journals.chmod(0o777)
    assert "not believed" in read_journal(rundir, "n1").uncertain


def test_differences_are_told_where_the_head_stays_with_its_word() -> None:
    def view(state: WorkerState, pid: int | None = 5) -> WorkerView:
        return WorkerView(worker="a/0", role="a", index=0, node="n1", pid=pid, state=state)

    def told(
        state: WorkerState, verdict: Verdict, *, then: WorkerState | None = None, pid: int | None = 5
    ) -> list[str]:
        one = WorkerProbe(worker="a/0", node="n1", pid=5, verdict=verdict)
        return probe.differences([view(then or state, pid)], [view(state, pid)], [one])

    running, ended = WorkerState.RUNNING, WorkerState.EXITED
    assert told(running, Verdict.ALIVE) == told(ended, Verdict.GONE) == told(running, Verdict.UNKNOWN) == []
    assert told(running, Verdict.GONE) == ["a/0: the head says running, but pid 5 on n1 is gone"]
    assert told(running, Verdict.NOT_OURS) == ["a/0: the head says running, but pid 5 on n1 is another process"]
    assert told(ended, Verdict.ALIVE) == ["a/0: the head says exited, but pid 5 on n1 is alive"]
    assert told(running, Verdict.ALIVE, pid=6) == ["a/0: the head says pid 6 on n1, but the journal of n1 pid 5"]
    assert told(running, Verdict.GONE, then=WorkerState.STARTING) == []
