"""Stops: however awkward a worker's tree is, nothing of it is left, and none of it waits longer than it must."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from agent_rig import Rig, announced, brood, opened, order, python

from slurmfork import journal, process
from slurmfork.names import WorkerState
from slurmfork.process import Identity
from slurmfork.spec.model import Ready, Stop

AWKWARD_KINDS = ("plain", "ignores-term", "daemon", "scrubbed", "stopped", "headless")
SLEEP = ["sleep", "300"]
DEAF = python(
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('here', flush=True)\n"
    "while True: time.sleep(1)"
)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Path]:
    """Where awkward processes announce themselves; those that a broken stop left are killed, and fail the test."""
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


async def test_a_stop_is_as_quick_as_the_worker(rig: Rig) -> None:
    await rig.agent()
    seconds = []
    for number in range(10):
        await rig.start(order(f"a/{number}", SLEEP))
        [result] = await rig.stop(f"a/{number}")
        assert (result.exit_status, result.killed, result.survivors) == (143, False, [])
        seconds.append(result.seconds)
    assert statistics.median(seconds) < 0.1, seconds


async def test_all_of_an_awkward_tree_is_gone_and_the_clean_exit_is_known(rig: Rig, yard: Path) -> None:
    await rig.agent()
    await rig.start(order("a/0", brood(yard, *AWKWARD_KINDS), stop=Stop(grace=0.3)))
    await announced(rig, yard, *AWKWARD_KINDS, "leader")
    [result] = await rig.stop("a/0")
    assert (result.exit_status, result.killed, result.survivors) == (143, True, [])
    view = await rig.state("a/0", WorkerState.STOPPED)
    assert view.reason == "stopped (killed: it outlived its grace)"
    assert rig.below() == []


@pytest.mark.parametrize("kind", ["forks", "hops", "breeds"])
async def test_nothing_escapes_by_forking(rig: Rig, yard: Path, kind: str) -> None:
    await rig.agent()
    await rig.start(order("a/0", brood(yard, kind, leader="ignores-term"), stop=Stop(grace=0.2)))
    await announced(rig, yard, kind, "leader")
    [result] = await rig.stop("a/0")
    assert result.survivors == []
    await rig.until(lambda: rig.below() == [], "all to be gone")


async def test_a_stop_leaves_the_neighbours_alone(rig: Rig, tmp_path: Path) -> None:
    yards = [tmp_path / name for name in ("one", "two")]
    for path in yards:
        path.mkdir()
    await rig.agent()
    kinds = ("daemon", "scrubbed")
    await rig.start(*(order(f"a/{number}", brood(path, *kinds)) for number, path in enumerate(yards)))
    mine = await announced(rig, yards[0], *kinds, "leader")
    theirs = await announced(rig, yards[1], *kinds, "leader")
    [result] = await rig.stop("a/0")
    assert result.survivors == []
    assert not any(process.alive(one) for one in mine.values())
    assert all(process.alive(one) for one in theirs.values())
    await rig.end()
    assert not any(process.alive(one) for one in theirs.values())


async def test_the_leader_alone_is_asked_first_so_that_its_helpers_live_while_it_saves(rig: Rig, yard: Path) -> None:
    """A trainer that writes a last checkpoint needs its data loaders for that."""
    command = python(
        """
import os, signal, sys, time
awkward, yard = sys.argv[1:]
child = os.fork()
if child == 0:
    os.execv(sys.executable, [sys.executable, "-I", "-S", awkward, "graceful", yard, "helper"])
def save(*_):
    time.sleep(.3)
    print("helper lives" if os.waitpid(child, os.WNOHANG) == (0, 0) else "helper is gone", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, save)
print("here", flush=True)
while True: time.sleep(1)
""",
        str(Path(__file__).with_name("awkward.py")),
        str(yard),
    )
    await rig.agent()
    await rig.start(order("a/0", command))
    await announced(rig, yard, "helper")
    await rig.printed("a/0")
    [result] = await rig.stop("a/0")
    assert (await rig.printed("a/0", lines=2))[1] == "helper lives"
    assert (yard / "helper.bye").exists()  # and it was asked before it was left behind
    assert (result.exit_status, result.killed) == (0, False)


async def test_the_workers_own_signal_is_sent(rig: Rig) -> None:
    await rig.agent()
    command = python(
        "import signal, sys, time\nsignal.signal(signal.SIGUSR2, lambda *_: sys.exit(9))\nprint('here', flush=True)\n"
        "while True: time.sleep(1)"
    )
    await rig.start(order("a/0", command, stop=Stop(signal="USR2")))
    await rig.printed("a/0")
    [result] = await rig.stop("a/0")
    assert (result.exit_status, result.killed) == (9, False)


async def test_sixteen_deaf_ones_take_one_grace_side_by_side(rig: Rig) -> None:
    await rig.agent()
    names = [f"a/{number}" for number in range(16)]
    await rig.start(*(order(name, DEAF, stop=Stop(grace=1.0)) for name in names))
    for name in names:
        await rig.printed(name)
    begun = time.monotonic()
    results = await rig.stop(*names)
    assert [result.exit_status for result in results] == [137] * 16
    assert all(result.killed and result.seconds >= 1.0 for result in results)
    assert time.monotonic() - begun < 6.0  # one after the other it would be 16


async def test_a_second_stop_may_shorten_the_first(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", DEAF, stop=Stop(grace=300)))
    await rig.printed("a/0")
    first = asyncio.ensure_future(rig.stop("a/0"))
    await asyncio.sleep(0.1)
    assert not first.done()
    [second] = await rig.stop("a/0", grace=0.0)
    assert (await first)[0].exit_status == second.exit_status == 137


async def test_stopping_what_is_not_there_is_no_error(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", ["true"]))
    await rig.state("a/0", WorkerState.EXITED)
    results = await rig.stop("a/0", "never/1")
    assert [(result.worker, result.exit_status, result.survivors) for result in results] == [
        ("a/0", 0, []),
        ("never/1", None, []),
    ]
    assert rig.agents["n0"].views["a/0"].state is WorkerState.EXITED


async def test_what_a_worker_left_behind_when_it_ended_is_ended_too(rig: Rig, yard: Path) -> None:
    command = brood(yard, "daemon", "ignores-term", "scrubbed")
    await rig.agent()
    await rig.start(order("a/0", command, stop=Stop(grace=0.2)))
    found = await announced(rig, yard, "daemon", "ignores-term", "scrubbed", "leader")
    process.send(found["leader"], signal.SIGKILL)
    view = await rig.state("a/0", WorkerState.FAILED)
    assert view.reason.startswith("killed by SIGKILL")
    await rig.until(lambda: not any(map(process.alive, found.values())), "the rest to be ended")


async def test_a_daemon_that_shed_its_tag_is_known_by_what_was_seen_of_it(rig: Rig, yard: Path) -> None:
    """Double fork, session of its own, no environment, no log: only the heartbeat saw it below the worker."""
    command = python(
        """
import os, sys, time
awkward, yard = sys.argv[1:]
if os.fork() == 0:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3): os.dup2(null, number)
    while not os.path.exists(yard + "/go"): time.sleep(.01)
    argv = [sys.executable, "-I", "-S", awkward, "ignores-term", yard, "shed"]
    if os.fork() == 0: os.execve(sys.executable, argv, {})
    os._exit(0)
os.wait()
while True: time.sleep(1)
""",
        str(Path(__file__).with_name("awkward.py")),
        str(yard),
    )
    await rig.agent()
    await rig.start(order("a/0", command, stop=Stop(grace=0.2)))

    def seen() -> int:
        records = journal.read(rig.rundir.journal("n0"))
        return sum(len(record.processes) for record in records if isinstance(record, journal.Seen))

    await rig.until(lambda: seen() == 1, "the heartbeat to see it")
    (yard / "go").touch()
    found = await announced(rig, yard, "shed")
    await rig.stop("a/0", forget=True)
    if process.alive(found["shed"]):  # nobody saw it between its fork and its exec: the end of the node finds it
        await rig.end()
    assert not process.alive(found["shed"])


async def test_a_forgotten_worker_is_gone_from_the_table(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", SLEEP))
    await rig.stop("a/0", forget=True)
    assert await rig.ask("views", None, list[object]) == []


async def test_scratch_and_sockets_go_with_the_worker(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", ["sh", "-c", "echo x > $TMPDIR/f; sleep 300"], ready=Ready(notify=True)))
    await rig.until(lambda: (rig.local() / "t" / "a-0" / "f").exists(), "the file in its scratch")
    assert (rig.local() / "n" / "a-0").is_socket()
    await rig.stop("a/0")
    assert not (rig.local() / "n" / "a-0").exists()
    await rig.until(lambda: not list(rig.local().glob("**/f")), "the scratch to be removed")
    await rig.end()
    assert not rig.local().exists()


async def test_a_busy_agent_reaps_every_orphan(rig: Rig) -> None:
    await rig.agent()
    command = python(
        "import os\nfor n in range(50):\n if os.fork() == 0:\n  if os.fork() == 0: os._exit(0)\n  os._exit(0)\n"
        "while True:\n try: os.wait()\n except ChildProcessError: break\n"
        "print('done', flush=True)\nimport time; time.sleep(300)"
    )
    [view] = await rig.start(order("a/0", command))
    await rig.printed("a/0")
    await rig.until(lambda: rig.below() == [view.pid], "the orphans to be reaped")


@contextlib.contextmanager
def suspended(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_an_agent_that_was_frozen_goes_on_as_if_nothing_had_been(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", SLEEP))
    agent = rig.agents["n0"].join.agent_pid
    with suspended(agent):
        await asyncio.sleep(1.5)  # longer than the lease
    [view] = await rig.start(order("a/1", SLEEP))
    assert view.state is WorkerState.RUNNING
    assert rig.agents["n0"].joins == 1
