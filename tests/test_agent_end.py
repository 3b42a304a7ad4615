"""The end of a node's work: ordered, by signal, or because head, guardian or agent are gone. Nothing is ever left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agent_rig import AGENT, Rig, announced, brood, opened, order, python

from slurmfork import process
from slurmfork.errors import Refused
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import EndOrder, EndReport
from slurmfork.process import Identity
from slurmfork.spec.model import Restart, Stop

KINDS = ("plain", "ignores-term", "daemon", "scrubbed")
SLEEP = ["sleep", "300"]
GRACEFUL = python(
    "import signal, sys, time\n"
    "def leave(*_):\n time.sleep(.3); print('saved', flush=True); sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, leave)\nprint('here', flush=True)\nwhile True: time.sleep(1)"
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Path]:
    """Where awkward processes announce themselves; those that were left are killed, and fail the test."""
    path = tmp_path / "yard"
    path.mkdir()
    yield path
    left = []
    for file in path.glob("*.pid"):
        pid, start_time = map(int, file.read_text().split())
        one = Identity(pid, start_time, process.boot_id())
        if process.alive(one):
            left.append(process.describe(one))
            process.send(one, signal.SIGKILL)
    assert not left, f"left running: {left}"


async def with_brood(rig: Rig, yard: Path, **environment: str) -> dict[str, Identity]:
    """An agent with a worker whose tree is awkward."""
    await rig.agent(**environment)
    await rig.start(order("a/0", brood(yard, *KINDS), stop=Stop(grace=0.3)))
    return await announced(rig, yard, *KINDS, "leader")


def all_gone(found: dict[str, Identity]) -> bool:
    return not any(process.alive(one) for one in found.values())


# --- by order


async def test_an_ordered_end_stops_all_and_the_agent_leaves_well(rig: Rig, yard: Path) -> None:
    found = await with_brood(rig, yard)
    await rig.start(order("b/0", GRACEFUL))
    await rig.printed("b/0")
    report = await rig.end(budget=None)
    assert report.survivors == []
    results = {result.worker: result for result in report.results}
    assert (results["b/0"].exit_status, results["b/0"].killed) == (0, False)
    assert results["a/0"].killed
    assert all_gone(found)
    assert rig.guardians["n0"].returncode == 0
    assert not rig.local().exists()
    assert "saved" in rig.log("b/0")


async def test_a_budget_cuts_graces_short(rig: Rig) -> None:
    await rig.agent()
    deaf = python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('here', flush=True)\ntime.sleep(300)")
    await rig.start(order("a/0", deaf, stop=Stop(grace=200)))
    await rig.printed("a/0")
    begun = time.monotonic()
    report = await rig.end(budget=1.5)
    assert (report.results[0].exit_status, report.survivors) == (137, [])
    assert time.monotonic() - begun < 20


async def test_nobodys_orphans_end_with_the_node(rig: Rig, yard: Path) -> None:
    """A daemon that shed everything at once, seen by no heartbeat, is nobody's; it is below the agent all the same."""
    rig.welcome.heartbeat = 300.0
    await rig.agent()
    command = ["env", "-i", sys.executable, "-I", "-S", str(Path(__file__).with_name("awkward.py"))]
    shell = f"{' '.join(command)} scrubbed {yard} scrubbed </dev/null >/dev/null 2>&1; sleep 300"
    await rig.start(order("a/0", shell))
    found = await announced(rig, yard, "scrubbed")
    await rig.stop("a/0")
    report = await rig.end()
    assert report.survivors == []
    assert all_gone(found)


async def test_a_tagged_process_that_is_not_below_the_agent_ends_too(rig: Rig) -> None:
    await rig.agent()
    stray = subprocess.Popen(
        ["sleep", "300"], env={"PATH": os.environ["PATH"], "SLURMFORK_RUN_ID": rig.run_id, "SLURMFORK_NODE": "n0"}
    )
    other = subprocess.Popen(
        ["sleep", "300"], env={"PATH": os.environ["PATH"], "SLURMFORK_RUN_ID": rig.run_id, "SLURMFORK_NODE": "n1"}
    )
    try:
        report = await rig.end()
        assert report.survivors == []
        assert stray.wait(30) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        for one in (stray, other):
            one.kill()
            one.wait(30)


async def test_nothing_is_started_or_restarted_while_the_node_ends(rig: Rig) -> None:
    await rig.agent()
    await rig.start(
        order("a/0", GRACEFUL), order("b/0", ["true"], restart=Restart(policy="always", max=1000, backoff=0.05))
    )
    await rig.printed("a/0")
    ending = asyncio.ensure_future(rig.ask("end", EndOrder(budget=10.0), EndReport))
    await rig.until(lambda: "orders the end" in rig.rundir.agent_log("n0").read_text(), "the end to begin")
    with pytest.raises(Refused) as refused:
        await rig.start(order("c/0", SLEEP))
    assert refused.value.kind == "stopping"
    report = await ending
    await rig.gone()
    assert report.survivors == []
    states = {view.worker: view.state for view in rig.agents["n0"].views.values()}
    assert states["a/0"] is WorkerState.STOPPED
    assert states["b/0"] in (WorkerState.STOPPED, WorkerState.EXITED)


# --- by signal


async def test_sigterm_is_told_to_the_head_whose_order_is_waited_for(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", GRACEFUL))
    await rig.printed("a/0")
    rig.guardians["n0"].terminate()
    await rig.until(lambda: bool(rig.agents["n0"].going), "the agent to say that it is going")
    assert rig.agents["n0"].going[0].startswith("SIGTERM")
    report = await rig.end(budget=10.0)
    assert [result.exit_status for result in report.results] == [0]
    assert rig.guardians["n0"].returncode == 0


async def test_without_an_order_it_ends_by_itself_within_slurms_time(rig: Rig, yard: Path) -> None:
    found = await with_brood(rig, yard, SLURMFORK_KILL_WAIT="4")
    deaf = python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('here', flush=True)\ntime.sleep(300)")
    await rig.start(order("deaf/0", deaf, stop=Stop(grace=200)))
    await rig.printed("deaf/0")
    rig.guardians["n0"].terminate()
    assert await rig.gone() == 143
    assert all_gone(found)
    assert rig.agents["n0"].views["deaf/0"].exit_status == 137


async def test_a_second_and_a_third_sigterm_mean_no_more_than_the_first(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", GRACEFUL))
    await rig.printed("a/0")
    for _ in range(3):
        rig.guardians["n0"].terminate()
        await asyncio.sleep(0.1)
    assert await rig.gone() == 143
    assert rig.log("a/0").splitlines() == ["here", "saved"]
    assert rig.agents["n0"].views["a/0"].exit_status == 0
    assert len(rig.agents["n0"].going) == 1


async def test_sigterm_puts_a_limit_to_an_end_that_had_none(rig: Rig) -> None:
    await rig.agent(SLURMFORK_KILL_WAIT="3")
    deaf = python("import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('here', flush=True)\ntime.sleep(300)")
    await rig.start(order("a/0", deaf, stop=Stop(grace=200)))
    await rig.printed("a/0")
    ending = asyncio.ensure_future(rig.ask("end", EndOrder(budget=None), EndReport))
    await asyncio.sleep(0.1)
    rig.guardians["n0"].terminate()
    report = await ending
    assert (report.results[0].exit_status, report.survivors) == (137, [])
    assert await rig.gone() == 0


async def test_a_worker_that_slurm_signals_too_is_not_restarted(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", SLEEP, restart=Restart(policy="always", max=100, backoff=0.0)))
    worker = process.identify(rig.agents["n0"].views["a/0"].pid or 0)
    assert worker is not None
    rig.guardians["n0"].terminate()
    await rig.until(lambda: bool(rig.agents["n0"].going), "the agent to say that it is going")
    process.send(worker, signal.SIGTERM)
    assert await rig.gone() == 143
    assert rig.agents["n0"].views["a/0"].restarts == 0


# --- somebody is gone


async def test_when_the_agent_is_killed_its_guardian_cleans_up(rig: Rig, yard: Path) -> None:
    found = await with_brood(rig, yard)
    os.kill(rig.agents["n0"].join.agent_pid, signal.SIGKILL)
    assert await rig.gone() == 137
    assert all_gone(found)


async def test_when_the_guardian_is_killed_the_agent_cleans_up(rig: Rig, yard: Path) -> None:
    found = await with_brood(rig, yard)
    agent = process.identify(rig.agents["n0"].join.agent_pid)
    assert agent is not None
    rig.guardians["n0"].kill()
    await rig.until(lambda: bool(rig.agents["n0"].going), "the agent to say that it is going")
    assert "guardian" in rig.agents["n0"].going[0]
    await rig.until(lambda: not process.alive(agent), "the agent to end")
    assert all_gone(found)
    assert not rig.local().exists()


async def test_a_lost_link_is_found_again_and_everything_is_told_anew(rig: Rig) -> None:
    await rig.agent()
    [view] = await rig.start(order("a/0", SLEEP))
    end = rig.agents["n0"]
    end.views.clear()
    rig.hang_up()
    await rig.until(lambda: end.joins == 2 and "a/0" in end.views, "the agent to come back")
    assert end.views["a/0"].pid == view.pid
    assert [view.worker for view in await rig.ask("views", None, list[WorkerView])] == ["a/0"]


async def test_when_the_head_stays_away_everything_is_stopped(rig: Rig, yard: Path) -> None:
    found = await with_brood(rig, yard)
    rig.hang_up(deaf=True)
    assert await rig.gone() == 1
    assert all_gone(found)
    assert "the head is lost" in rig.rundir.agent_log("n0").read_text()


async def test_a_head_that_refuses_is_taken_at_its_word(rig: Rig) -> None:
    rig.welcome.run_id = "another-run"
    rig.launch()
    assert await rig.gone() == 1
    assert "the head is of run another-run" in rig.rundir.agent_log("n0").read_text()


async def test_an_agent_that_no_head_started_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", str(AGENT)], env={}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "SLURMFORK_RUN_ID" in done.stderr
    assert "Traceback" not in done.stderr


async def test_heads_are_tried_in_their_order_until_one_answers(rig: Rig) -> None:
    await rig.agent(SLURMFORK_HEAD=f"127.0.0.1:1,127.0.0.1:{rig.port}")
    assert rig.agents["n0"].joins == 1
