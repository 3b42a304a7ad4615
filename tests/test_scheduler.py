"""The scheduler API in real runs: roles created, forked, called, deleted one after the other, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_classes
import pytest
from engine_classes import Mishap, Sample
from processes import wait_until
from running import Shell, environ_of

from slurmfork import Run, Scheduler, process
from slurmfork.errors import (
    EngineError,
    EngineNotFound,
    PortAllocationError,
    StillAlive,
    UsageError,
    WorkerCreationError,
    WorkerFailed,
    WorkerNotFound,
    WorkerTimeout,
)
from slurmfork.messages import StopReply

ENGINE = 'engine: "engine_classes:Engine", on_failure: ignore'
BARE = 'engine: "slurmfork.engine.bare:Bare", on_failure: ignore'
SPEC = f"""
name: scheduled
backend: local
nodes: 2
local: {{gpus-per-node: 4}}
roles:
  actor: {{replicas: 4, gpus: 1, ports: 1, env: {{GREETING: hello}}, {BARE}, autostart: false}}
  rollout: {{replicas: 2, gpus: 2, {ENGINE}, autostart: false}}
  critic: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}, autostart: false}}
  reference: {{{ENGINE}, strategy: {{type: colocation, target: actor}}, autostart: false}}
  server: {{{ENGINE}, gpus: 2, strategy: {{type: colocation, target: actor}}, autostart: false}}
  many: {{{ENGINE}, replicas: 8, strategy: {{type: colocation, target: actor}}, autostart: false}}
  uneven: {{{ENGINE}, replicas: 3, strategy: {{type: colocation, target: actor}}, autostart: false}}
  proxy: {{{ENGINE}, ports: 2, strategy: {{type: colocation, target: reference}}, autostart: false}}
  failing: {{{ENGINE}, kwargs: {{fail: true}}, strategy: {{type: colocation, target: actor}}, autostart: false}}
  slow: {{{ENGINE}, kwargs: {{slow: 600}}, strategy: {{type: colocation, target: actor}}, autostart: false}}
"""
ACTORS = [f"actor/{index}" for index in range(4)]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("scheduler"))
    shutil.copy(engine_classes.__file__, made.directory)
    yield made
    made.end()


@pytest.fixture(scope="module")
def run(shell: Shell) -> Run:
    """One run for all tests: each deletes what it created."""
    return Run.load(shell.submit(shell.spec(SPEC)), shell.root)


@pytest.fixture
def scheduler(run: Run) -> Iterator[Scheduler]:
    made = Scheduler(run=run)
    yield made
    made.delete_workers()
    assert not [view for view in run.workers() if view.pid and process.identify(view.pid)]


@pytest.fixture
def actors(scheduler: Scheduler) -> list[str]:
    return scheduler.create_workers("actor")


def pids(scheduler: Scheduler, role: str) -> list[int]:
    return [worker.pid or 0 for worker in scheduler.get_workers(role)]


# --- creating and deleting ---------------------------------------------------------------------------------


def test_roles_are_created_in_any_order_on_devices_kept_for_them(scheduler: Scheduler) -> None:
    assert scheduler.create_workers("rollout") == ["rollout/0", "rollout/1"]
    assert scheduler.create_workers("actor") == ACTORS
    taken = [
        (one.node, gpu) for role in ("actor", "rollout") for one in scheduler.get_workers(role) for gpu in one.gpus
    ]
    assert len(taken) == len(set(taken)) == 8
    assert scheduler.n_gpus_per_node == 4
    before = {one.id: (one.node, one.gpus, one.pid) for one in scheduler.get_workers("rollout")}
    scheduler.delete_workers("rollout")
    assert not [pid for _, _, pid in before.values() if pid and process.identify(pid)]
    assert scheduler.call_engine("actor/0", "environment", "GREETING") == ["hello"]
    scheduler.create_workers("rollout")
    after = {one.id: (one.node, one.gpus, one.pid) for one in scheduler.get_workers("rollout")}
    assert [place[:2] for place in after.values()] == [place[:2] for place in before.values()]
    assert not {place[2] for place in after.values()} & {place[2] for place in before.values()}


def test_a_run_without_workers_goes_on(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.delete_workers()
    assert scheduler.run.status().state == "ready"
    assert scheduler.create_workers("actor") == actors


def test_workers_tell_where_they_are(scheduler: Scheduler, actors: list[str]) -> None:
    workers = scheduler.get_workers("actor")
    assert [worker.id for worker in workers] == actors
    for worker in workers:
        assert worker.address == "127.0.0.1"
        assert environ_of(worker.pid or 0)["SLURMFORK_PORTS"] == ",".join(map(str, worker.ports))
        assert environ_of(worker.pid or 0)["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, worker.gpus))


def test_creating_a_role_twice_is_refused(scheduler: Scheduler, actors: list[str]) -> None:
    with pytest.raises(WorkerCreationError, match="role actor runs already") as caught:
        scheduler.create_workers("actor")
    assert (caught.value.role, caught.value.kind) == ("actor", "in_use")
    assert pids(scheduler, "actor")


def test_the_environment_of_a_creation_is_the_workers(scheduler: Scheduler) -> None:
    scheduler.create_workers("actor", env={"GREETING": "goodbye", "MORE": "1"})
    assert scheduler.call_engine("actor/3", "environment", "GREETING", "MORE") == ["goodbye", "1"]
    scheduler.fork_workers("reference", "actor", env={"MORE": "2"})
    assert scheduler.role("reference").call("environment", "MORE") == ["2"] * 4
    assert scheduler.role("reference").call("environment", "GREETING") == ["goodbye"] * 4  # its target's


def test_the_environment_of_a_running_worker_can_be_set(scheduler: Scheduler, actors: list[str]) -> None:
    for value in ("first", "second"):
        scheduler.set_worker_env("actor/1", {"LATER": value})
        scheduler.create_engine("actor/1", "engine_classes:Engine", value)
        assert scheduler.call_engine("actor/1", "environment", "LATER", engine=value) == value
    assert scheduler.call_engine("actor/0", "environment", "LATER") == [None]


def test_further_ports_are_a_workers_own(scheduler: Scheduler, actors: list[str]) -> None:
    given = [port for worker in scheduler.get_workers("actor") for port in worker.ports]
    more = [port for worker in actors for port in scheduler.allocate_ports(worker, 3)]
    assert len({*given, *more}) == 4 + 12
    with pytest.raises(PortAllocationError, match="1000 ports for actor/0"):
        scheduler.allocate_ports("actor/0", 1000)
    for key, words in (("actor/9", "has no worker"), ("actor", "name one worker of it, as actor/0")):
        with pytest.raises(WorkerNotFound, match=words):
            scheduler.allocate_ports(key)


# --- forking -----------------------------------------------------------------------------------------------


def test_a_fork_is_beside_each_target_in_a_process_of_its_own(scheduler: Scheduler, actors: list[str]) -> None:
    assert scheduler.fork_workers("reference", "actor") == [f"reference/{index}" for index in range(4)]
    for child, target in zip(scheduler.get_workers("reference"), scheduler.get_workers("actor"), strict=True):
        assert (child.target, child.node, child.gpus) == (target.id, target.node, target.gpus)
        assert child.pid != target.pid
        assert child.ports == ()  # its own, of which it asks for none
    assert scheduler.role("reference").call("pid") == pids(scheduler, "reference")


def test_sharing_roles_refer_to_the_same_processes(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.create_workers("critic")
    assert scheduler.role("critic").call("pid") == pids(scheduler, "actor") == pids(scheduler, "critic")


def test_counts_need_not_match(scheduler: Scheduler, actors: list[str]) -> None:
    assert len(scheduler.create_workers("server")) == 2  # of two GPUs, beside four actors of one
    servers = scheduler.get_workers("server")
    assert [(one.target, one.gpus) for one in servers] == [("actor/0", (0, 1)), ("actor/2", (2, 3))]
    assert len(scheduler.create_workers("many")) == 8
    assert [one.target for one in scheduler.get_workers("many")] == [name for name in ACTORS for _ in range(2)]
    with pytest.raises(WorkerCreationError, match="which does not come out even") as caught:
        scheduler.create_workers("uneven")
    assert caught.value.kind == "misfit"


def test_forks_may_be_several_or_beside_one(scheduler: Scheduler, actors: list[str]) -> None:
    assert scheduler.fork_workers("reference", "actor/2", count=3) == ["reference/0", "reference/1", "reference/2"]
    assert {one.target for one in scheduler.get_workers("reference")} == {"actor/2"}


def test_what_goes_beside_nobody_is_not_created(scheduler: Scheduler) -> None:
    for role in ("reference", "critic"):
        with pytest.raises(WorkerNotFound, match=r"no worker 'actor' \(it is declared") as caught:
            scheduler.create_workers(role)
        assert caught.value.key == "actor"


def test_one_worker_of_a_role_can_be_deleted(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.fork_workers("reference", "actor")
    scheduler.delete_workers("reference/1")
    assert [one.id for one in scheduler.get_workers("reference")] == ["reference/0", "reference/2", "reference/3"]
    rest = scheduler.role("reference")
    assert rest.call("pid") == pids(scheduler, "reference")
    assert rest.worker(2).name == "reference/2"
    with pytest.raises(UsageError, match="there is no 1"):
        rest.worker(1)
    for ask in (scheduler.get_workers, scheduler.delete_workers, scheduler.health):
        with pytest.raises(WorkerNotFound, match=r"has no worker 'reference/1'$"):
            ask("reference/1")


def test_any_command_can_be_forked(scheduler: Scheduler, actors: list[str]) -> None:
    assert len(scheduler.fork_workers("router", "actor", command=["sleep", "1000"], env={"A": "b"})) == 4
    (first, *_) = scheduler.get_workers("router")
    assert environ_of(first.pid or 0)["A"] == "b"
    with pytest.raises(UsageError, match="hosts no engine"):
        scheduler.call_engine("router/0", "anything")
    scheduler.delete_workers("router")
    with pytest.raises(WorkerCreationError, match="no-such-command"):
        scheduler.fork_workers("router", "actor", command=["no-such-command"])


def test_a_fork_of_a_fork(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.fork_workers("reference", "actor")
    scheduler.fork_workers("proxy", "reference")
    assert [one.target for one in scheduler.get_workers("proxy")] == [f"reference/{index}" for index in range(4)]
    assert [one.gpus for one in scheduler.get_workers("proxy")] == [one.gpus for one in scheduler.get_workers("actor")]
    ports = [port for one in scheduler.get_workers("proxy") for port in one.ports]
    assert len(set(ports)) == 8


def test_deleting_a_forked_role_ends_it_and_not_its_target(scheduler: Scheduler, actors: list[str]) -> None:
    before = pids(scheduler, "actor")
    scheduler.fork_workers("reference", "actor")
    children = pids(scheduler, "reference")
    scheduler.delete_workers("reference")
    assert not [pid for pid in children if process.identify(pid)]
    with pytest.raises(WorkerNotFound, match="it is declared: create_workers makes it"):
        scheduler.get_workers("reference")
    assert pids(scheduler, "actor") == before
    scheduler.fork_workers("reference", "actor")  # again: no more of them than before
    assert len(pids(scheduler, "reference")) == 4


def test_deleting_the_target_leaves_its_forked_children(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.fork_workers("reference", "actor")
    children = pids(scheduler, "reference")
    scheduler.delete_workers("actor")
    assert scheduler.role("reference").call("pid") == children
    with pytest.raises(WorkerNotFound):
        scheduler.fork_workers("critic", "actor")
    scheduler.create_workers("actor")  # beside what is there
    assert scheduler.role("reference").call("pid") == children


class Stubborn(Run):
    """A run that says of a role that a process of it would not die."""

    def stop(self, target: str, *, grace: float | None = None) -> StopReply:
        reply = super().stop(target, grace=grace)
        if target == "reference":
            reply.survivors = 1
            reply.results[0].survivors = ["the one that stays"]
        return reply


def test_what_would_not_die_is_told_when_all_others_are_gone(scheduler: Scheduler, actors: list[str]) -> None:
    stubborn = Scheduler(run=Stubborn(scheduler.run.rundir, scheduler.run.record))
    stubborn.create_workers("reference")
    with pytest.raises(StillAlive, match="1 processes of reference would not die: the one that stays"):
        stubborn.delete_workers()
    for role in ("reference", "actor"):
        with pytest.raises(WorkerNotFound):
            scheduler.get_workers(role)


def test_deleting_the_target_ends_what_shares_its_processes(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.create_workers("critic")
    scheduler.delete_workers("actor")
    with pytest.raises(WorkerNotFound):
        scheduler.call_engine("critic/0", "add", 1)


def test_a_fork_that_fails_leaves_nothing_and_says_why(scheduler: Scheduler, actors: list[str], shell: Shell) -> None:
    before = set(shell.pids(scheduler.run.run_id))
    with pytest.raises(WorkerCreationError, match="was told to fail") as caught:
        scheduler.fork_workers("failing", "actor")
    assert caught.value.kind == "start_failed"
    assert caught.value.workers[0].exit_status == 1
    assert "Mishap: was told to fail (4)" in caught.value.workers[0].log_tail
    assert set(shell.pids(scheduler.run.run_id)) <= before
    with pytest.raises(WorkerNotFound):
        scheduler.get_workers("failing")


def test_a_creation_has_a_time_limit(scheduler: Scheduler, actors: list[str]) -> None:
    with pytest.raises(WorkerTimeout, match=r"not ready within 0\.5 s") as caught:
        scheduler.create_workers("slow", timeout=0.5)
    assert (caught.value.key, caught.value.timeout, isinstance(caught.value, TimeoutError)) == ("slow", 0.5, True)
    with pytest.raises(WorkerNotFound):
        scheduler.get_workers("slow")


# --- engines -----------------------------------------------------------------------------------------------


def test_engines_are_created_called_and_removed(scheduler: Scheduler, actors: list[str]) -> None:
    scheduler.create_engine("actor/0", "engine_classes:Engine", "policy", 10, note="x")
    assert scheduler.call_engine("actor/0", "add", amount=5, engine="policy") == 15
    sample = Sample("p", [1.0])
    assert scheduler.call_engine("actor/0", "echo", sample, engine="policy") == sample
    with pytest.raises(Mishap, match="it broke") as caught:
        scheduler.call_engine("actor/0", "raises", 3, engine="policy")
    assert caught.value.code == 3
    with pytest.raises(EngineError, match="has an engine 'policy' already"):
        scheduler.create_engine("actor/0", "engine_classes:Engine", "policy")
    with pytest.raises(ModuleNotFoundError):
        scheduler.create_engine("actor/0", "no_such_module:Engine", "other")
    number: Any = 123
    with pytest.raises(UsageError, match="path is a word, in quotes, not 123"):
        scheduler.create_engine("actor/0", number, "other")
    scheduler.remove_engine("actor/0", "policy")
    with pytest.raises(EngineNotFound):
        scheduler.call_engine("actor/0", "add", engine="policy")
    with pytest.raises(WorkerNotFound, match="name one worker of it"):
        scheduler.call_engine("actor", "add")
    with pytest.raises(WorkerNotFound):
        scheduler.call_engine("actor/7", "add")


async def test_engines_of_many_workers_are_created_at_the_same_time(scheduler: Scheduler, actors: list[str]) -> None:
    makings = (scheduler.async_create_engine(name, "engine_classes:Engine", "late", i) for i, name in enumerate(actors))
    await asyncio.gather(*makings)
    assert scheduler.role("actor").call("add", 0, engine="late") == [0, 1, 2, 3]
    with pytest.raises(Mishap, match="told to fail"):
        await scheduler.async_create_engine("actor/0", "engine_classes:Engine", "bad", fail=True)


async def test_calls_are_awaited_and_cancelled(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.create_workers("rollout")
    assert await asyncio.gather(*(scheduler.async_call_engine(f"rollout/{i}", "echo", i) for i in (0, 1))) == [0, 1]
    assert scheduler.submit_call("rollout/0", "echo", "future").result(60) == "future"
    task = asyncio.create_task(scheduler.async_call_engine("rollout/0", "waits", str(tmp_path / "a")))
    while not (tmp_path / "a.began").exists():
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_call_that_failed_was_sent_once(scheduler: Scheduler) -> None:
    scheduler.create_workers("rollout")
    before = scheduler.call_engine("rollout/0", "add", 0)
    with pytest.raises(Mishap):
        scheduler.call_engine("rollout/0", "adds_and_raises", 3)
    assert scheduler.call_engine("rollout/0", "add", 0) == before + 3


def test_health_is_told_while_a_method_runs(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.create_workers("rollout")
    running = scheduler.submit_call("rollout/0", "blocks", str(tmp_path / "a"))
    wait_until((tmp_path / "a.began").exists, "the method to run")
    assert scheduler.health("rollout/0")["engines"][0]["method"] == "blocks"
    with pytest.raises(TimeoutError, match="has not answered within"):
        scheduler.call_engine("rollout/0", "echo", 1, timeout=0.1)
    (tmp_path / "a").touch()
    assert running.result(60) == "done"


def test_a_worker_that_dies_is_told_with_its_end(scheduler: Scheduler) -> None:
    scheduler.create_workers("rollout")
    with pytest.raises(WorkerFailed, match="the last word") as caught:
        scheduler.call_engine("rollout/1", "dies", 41)
    assert (caught.value.worker, caught.value.exit_status) == ("rollout/1", 41)
    with pytest.raises(WorkerFailed, match="exit status 41"):
        scheduler.get_workers("rollout")
    assert scheduler.call_engine("rollout/0", "echo", "others go on") == "others go on"
    with pytest.raises(WorkerFailed):
        scheduler.role("rollout")
    scheduler.delete_workers("rollout/1")
    assert [worker.id for worker in scheduler.get_workers("rollout")] == ["rollout/0"]
    assert len(scheduler.role("rollout").workers) == 1
    scheduler.delete_workers("rollout")
    with pytest.raises(WorkerNotFound):
        scheduler.get_workers("rollout")
    scheduler.create_workers("rollout")
    assert scheduler.call_engine("rollout/1", "echo", "again") == "again"


# --- runs --------------------------------------------------------------------------------------------------


def test_what_is_not_declared_is_named(scheduler: Scheduler) -> None:
    with pytest.raises(WorkerNotFound, match="the spec has no role 'nobody'"):
        scheduler.create_workers("nobody")
    number: Any = 3
    for key in ("nobody", "rollout/0", "not a name", number):
        with pytest.raises(WorkerNotFound) as caught:
            scheduler.delete_workers(key)
        assert caught.value.key == key


def test_a_scheduler_submits_a_run_and_ends_it(local: Shell) -> None:
    shutil.copy(engine_classes.__file__, local.directory)
    spec = local.spec(f"name: own\nbackend: local\nroles: {{a: {{{ENGINE}}}, b: {{{ENGINE}, autostart: false}}}}\n")
    here = Path.cwd()
    os.chdir(local.directory)
    try:
        with Scheduler(spec, root=local.root) as scheduler:
            assert scheduler.create_workers("a") == ["a/0"]  # which started by itself
            (pid,) = pids(scheduler, "a")
            assert scheduler.create_workers("b") == ["b/0"]
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: scheduler.run.workers("a")[0].state == "failed", "the death to be known")
            assert scheduler.run.status().state == "ready"
    finally:
        os.chdir(here)
    assert scheduler.run.status().state == "cancelled"
    assert local.left(scheduler.run.run_id) == []


CONTROLLER = """
import os, sys, slurmfork
scheduler = slurmfork.Scheduler(run=slurmfork.current().run)
scheduler.create_workers("actor")
print("sum", scheduler.call_engine("actor/0", "add", 5), flush=True)
os.kill(os.getpid(), 9) if sys.argv[1] == "killed" else None
"""


@pytest.mark.parametrize(("way", "state", "status"), [("ends", "completed", 0), ("killed", "failed", 137)])
def test_a_controller_within_a_run_takes_it_along(local: Shell, way: str, state: str, status: int) -> None:
    shutil.copy(engine_classes.__file__, local.directory)
    (local.directory / "controller.py").write_text(CONTROLLER)
    spec = local.spec(
        f"name: inside\nbackend: local\nroles:\n  actor: {{{ENGINE}, autostart: false}}\n"
        f"  controller: {{command: [{local.python}, controller.py, {way}], main: true}}\n"
    )
    run_id = local.submit(spec)
    assert local.call("wait", run_id).returncode == status, local.logs(run_id)
    assert "sum 5" in (local.root / run_id / "logs" / "controller-0.log").read_text()
    assert local.status(run_id)["state"] == state
    assert local.left(run_id) == []


def test_an_allocation_that_does_not_come_in_time_is_told(local: Shell) -> None:
    never = "command: [sleep, infinity], ready: {notify: true, timeout: 600}"
    run_id = local.submit(local.spec(f"name: late\nbackend: local\nroles: {{a: {{{never}}}}}\n"))
    scheduler = Scheduler(run=Run.load(run_id, local.root))
    for ask in (lambda: scheduler.wait(0.5), lambda: scheduler.get_workers("a", timeout=0.5)):
        with pytest.raises(WorkerTimeout, match=r"is not ready after 0\.5 s") as caught:
            ask()
        assert (caught.value.key, caught.value.timeout) == (run_id, 0.5)
    assert scheduler.close().survivors == 0


def test_a_run_that_fails_is_told_at_the_first_creation(local: Shell) -> None:
    spec = local.spec("name: bad\nbackend: local\nroles: {a: {command: [sh, -c, 'echo why; exit 3']}}\n")
    scheduler = Scheduler(run=Run.load(local.submit(spec), local.root))
    with pytest.raises(WorkerCreationError, match="why") as caught:
        scheduler.create_workers("a")
    assert caught.value.workers[0].exit_status == 3
    with pytest.raises(UsageError, match="give one"):
        Scheduler()
