"""The guardian, with a stand-in below it: whatever becomes of the agent, nothing of it stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import PATIENCE, Yard, wait_until

from slurmfork import names, process

STAND_IN = Path(__file__).with_name("stand_in_agent.py")
PACKAGE = Path(process.__file__).parent
AWKWARD = ["plain", "ignores-term", "daemon", "scrubbed", "stopped", "forks", "breeds", "headless"]


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


def environment(yard: Yard, *, grace: float) -> dict[str, str]:
    """As srun gives it to its tasks: the run's id, and no node's name of ours."""
    return {
        names.RUN_ID: yard.run_id,
        "SLURMD_NODENAME": yard.node,
        "SLURMFORK_GUARDIAN_GRACE": str(grace),
        "PYTHONPATH": str(PACKAGE.parent),
    }


def start(yard: Yard, *arguments: str, guardian: str = "guarded", grace: float = 0.2) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(STAND_IN), str(yard.directory), guardian, *arguments]
    return yard.run(command, env=environment(yard, grace=grace))


def kill_agent(yard: Yard) -> None:
    assert process.send(yard.await_one("agent"), signal.SIGKILL)


# --- how it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["leaves", "0"], 0),
        (["leaves", "3"], 3),
        (["exits"], 0),
        (["exits", "a word"], 1),
        (["raises", "alas"], 1),
    ],
    ids=str,
)
def test_the_status_is_the_agents(yard: Yard, arguments: list[str], status: int) -> None:
    assert start(yard, *arguments).wait(PATIENCE) == status
    assert ("alas" in yard.errors()) == ("alas" in arguments)


def test_the_agent_killed_leaves_nothing(yard: Yard) -> None:
    yard.innocent("of-another-run", **{names.RUN_ID: yard.run_id + "0", names.NODE: yard.node})
    yard.innocent("of-another-node", **{names.RUN_ID: yard.run_id, names.NODE: "n10"})
    yard.innocent("of-the-head", **{names.RUN_ID: yard.run_id})
    yard.innocent("slurmfork-agent")
    guardian = start(yard, "works", *AWKWARD)
    yard.await_all(AWKWARD)
    kill_agent(yard)
    assert guardian.wait(PATIENCE) == 128 + signal.SIGKILL
    assert yard.living() == []
    yard.assert_innocents_live()
    assert "was ended by signal 9" in yard.errors()
    ended = re.search(r"ended (\d+) processes", yard.errors())
    assert ended is not None
    assert int(ended[1]) > len(AWKWARD) + 50  # the one that breeds had offspring when it was asked to stop


def test_without_a_guardian_all_of_it_stays(yard: Yard) -> None:
    """What the test above would see if the guardian did nothing."""
    agent = start(yard, "works", *AWKWARD, guardian="bare")
    everything = yard.await_all(AWKWARD)
    kill_agent(yard)
    agent.wait(PATIENCE)
    assert len(yard.living()) == len(everything) == len(AWKWARD) + 50
    yard.kill(*everything)


def test_nothing_escapes_by_forking(yard: Yard) -> None:
    guardian = start(yard, "works", "hops")
    yard.await_one("hops")
    kill_agent(yard)
    assert guardian.wait(PATIENCE) == 128 + signal.SIGKILL
    assert yard.living() == []


def test_what_a_content_agent_leaves_is_ended_too(yard: Yard) -> None:
    guardian = start(yard, "leaves", "0", "scrubbed", "ignores-term")
    assert guardian.wait(PATIENCE) == 0
    assert yard.living() == []
    assert "ended 2 processes" in yard.errors()


def test_the_tag_finds_what_is_not_below(yard: Yard) -> None:
    yard.start("plain", "elsewhere")
    assert start(yard, "leaves", "3").wait(PATIENCE) == 3
    assert yard.living() == []


def test_a_job_that_a_worker_submitted_is_left_alone(yard: Yard) -> None:
    yard.innocent("submitted", **yard.tag, SLURM_JOB_ID="8")
    command = [sys.executable, str(STAND_IN), str(yard.directory), "guarded", "leaves", "3"]
    guardian = yard.run(command, env={**environment(yard, grace=0.2), "SLURM_JOB_ID": "7"})
    assert guardian.wait(PATIENCE) == 3
    yard.assert_innocents_live()


def test_there_is_time_to_leave_in_order(yard: Yard) -> None:
    guardian = start(yard, "works", "graceful", grace=PATIENCE)
    yard.await_one("graceful")
    kill_agent(yard)
    assert guardian.wait(PATIENCE) == 128 + signal.SIGKILL
    assert (yard.directory / "graceful.bye").exists()


# --- signals -----------------------------------------------------------------------------------------------


def test_signals_are_passed_on(yard: Yard) -> None:
    guardian = start(yard, "listens")
    yard.await_one("agent")
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCONT", "SIGTERM"):
        guardian.send_signal(signal.Signals[name])
        wait_until((yard.directory / f"heard-{name}").exists, f"the agent to hear {name}")
    assert guardian.wait(PATIENCE) == 5


def test_a_signal_that_ends_the_agent_is_survived(yard: Yard) -> None:
    guardian = start(yard, "works", "ignores-term")
    yard.await_all(["ignores-term", "agent"])
    guardian.send_signal(signal.SIGQUIT)
    assert guardian.wait(PATIENCE) == 128 + signal.SIGQUIT
    assert yard.living() == []


def test_sigterm_at_any_moment_of_the_start_ends_it(yard: Yard) -> None:
    """From before the guardian is ready until the agent is: it ends, and nothing stays."""
    for delay in range(0, 120, 10):
        guardian = start(yard, "works", "plain")
        time.sleep(delay / 1000)  # the moment is what is tried here
        guardian.terminate()
        assert guardian.wait(PATIENCE) in (-signal.SIGTERM, 128 + signal.SIGTERM)
        assert yard.living() == []


def test_more_signals_do_not_break_the_cleanup(yard: Yard) -> None:
    guardian = start(yard, "works", "ignores-term", "scrubbed", grace=0.5)
    yard.await_all(["ignores-term", "scrubbed"])
    kill_agent(yard)
    while guardian.poll() is None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            guardian.send_signal(number)
        time.sleep(0.01)  # not to drown the machine in signals
    assert guardian.returncode == 128 + signal.SIGKILL
    assert yard.living() == []


def test_an_agent_that_hangs_when_it_is_told_to_end_is_ended_before_slurm_would(yard: Yard) -> None:
    command = [sys.executable, str(STAND_IN), str(yard.directory), "guarded", "works", *AWKWARD]
    guardian = yard.run(command, env={**environment(yard, grace=PATIENCE), names.KILL_WAIT: "3"})
    yard.await_all([*AWKWARD, "agent"])
    agent = yard.await_one("agent")
    process.send(agent, signal.SIGSTOP)
    wait_until(lambda: process.describe(agent).endswith("state T"), "the agent to be stopped")
    guardian.terminate()
    assert guardian.wait(PATIENCE) == 128 + signal.SIGKILL
    assert yard.living() == []
    assert "was told to end and does not" in yard.errors()


def test_orphans_are_reaped(yard: Yard) -> None:
    guardian = start(yard, "orphans")
    agent = yard.await_one("agent")
    wait_until(lambda: process.children(guardian.pid) == [agent.pid], "the orphans to be reaped")
    guardian.send_signal(signal.SIGTERM)
    assert guardian.wait(PATIENCE) == 128 + signal.SIGTERM


def test_the_end_of_the_parent_is_a_sigterm(yard: Yard) -> None:
    """The parent, srun's step daemon on Slurm, is killed: nobody is there to signal any more."""
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
    stand_in = [sys.executable, str(STAND_IN), str(yard.directory), "guarded", "listens"]
    parent = yard.run([sys.executable, "-c", code, *stand_in], env=environment(yard, grace=0.2))
    agent = yard.await_one("agent")
    parent.kill()
    wait_until((yard.directory / "heard-SIGTERM").exists, "the agent to hear of it")
    wait_until(lambda: not process.alive(agent), "the agent to end")


def test_inherited_dispositions_do_not_matter(yard: Yard) -> None:
    """A shell that ignores signals hands that down; an ignored SIGCHLD would lose the agent's status."""
    shell = ["sh", "-c", 'trap "" CHLD INT HUP TERM; exec "$@"', "sh"]
    stand_in = [sys.executable, str(STAND_IN), str(yard.directory), "guarded"]
    assert yard.run([*shell, *stand_in, "leaves", "3"], env=environment(yard, grace=0)).wait(PATIENCE) == 3
    assert yard.run([*shell, *stand_in, "state"], env=environment(yard, grace=0)).wait(PATIENCE) == 0
    python_ignores = sorted([int(signal.SIGPIPE), int(signal.SIGXFSZ)])
    assert (yard.directory / "state").read_text() in (f"[] {python_ignores}", f"[] {python_ignores[:1]}")


# --- what it is --------------------------------------------------------------------------------------------


def test_it_is_light() -> None:
    """It stays on every node for as long as the run."""
    code = "import sys; sys.path.append(sys.argv[1]); import slurmfork.agent.guardian; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(PACKAGE.parent)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    heavy = {
        "asyncio",
        "dataclasses",
        "inspect",
        "json",
        "logging",
        "msgspec",
        "pathlib",
        "socket",
        "subprocess",
    }
    assert heavy.isdisjoint(done.stdout.split()), done.stderr
    assert "slurmfork.agent.guardian" in done.stdout.split()


def test_guardian_and_agent_have_names(yard: Yard) -> None:
    guardian = start(yard, "listens")
    agent = yard.await_one("agent")
    assert Path(f"/proc/{guardian.pid}/comm").read_text() == "slurmfork-guard\n"
    assert Path(f"/proc/{agent.pid}/comm").read_text() == "slurmfork-agent\n"
    guardian.terminate()
    guardian.wait(PATIENCE)


@pytest.mark.parametrize("isolated", [True, False])
def test_the_door_opens_both_ways(yard: Yard, tmp_path: Path, isolated: bool) -> None:
    """Without the run's variables the agent has nothing to do, and says so from inside its own module."""
    door = ["-I", str(PACKAGE / "agent" / "__main__.py")] if isolated else ["-m", "slurmfork.agent"]
    env = {} if isolated else {"PYTHONPATH": str(PACKAGE.parent)}
    guardian = yard.run([sys.executable, *door], env=env)
    assert guardian.wait(PATIENCE) not in (0, -signal.SIGTERM)
    assert "slurmfork.agent.guardian" not in yard.errors()
    assert yard.errors()


def test_descriptors_of_the_guardian_are_few(yard: Yard) -> None:
    guardian = start(yard, "listens")
    yard.await_one("agent")
    assert len(os.listdir(f"/proc/{guardian.pid}/fd")) == 3
    guardian.terminate()
    guardian.wait(PATIENCE)
