"""Engines in real runs on this machine: calls, streams, exceptions, deaths, and both kinds of colocation."""

from __future__ import annotations

import asyncio
import concurrent.futures
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import engine_classes
import numpy
import pytest
from agent_rig import own_pid
from cluster import Factory
from engine_classes import Colour, Mishap, Plain, Sample, Speechless
from namespaced import may_make_namespaces
from running import Shell

from slurmfork import Run, process
from slurmfork.engine import Role, Worker
from slurmfork.engine.failures import RemoteTraceback
from slurmfork.errors import (
    CodecError,
    EngineCallError,
    EngineError,
    EngineNotFound,
    Refused,
    UsageError,
    WorkerFailed,
)

PATIENCE = 60.0
ENGINE = 'engine: "engine_classes:Engine"'
SPEC = f"""
name: engines
backend: local
nodes: 1
local: {{gpus-per-node: 2}}
roles:
  actor:
    replicas: 2
    gpus: 1
    {ENGINE}
    args: [10]
    kwargs: {{note: first}}
    env: {{GREETING: hello}}
    ports: 1
    pickle: true
  critic: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}, kwargs: {{note: shared}}}}
  reference: {{{ENGINE}, strategy: {{type: colocation, target: actor}}, autostart: false}}
  late: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}, autostart: false}}
  other: {{command: [sleep, infinity]}}
"""


def begun(shell: Shell, spec: str) -> Run:
    """A run that is up, whose workers find the classes of these tests in their working directory."""
    shutil.copy(engine_classes.__file__, shell.directory)
    run_id = shell.ready(shell.spec(spec))
    return Run.load(run_id, shell.root)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("engines"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def run(shell: Shell) -> Run:
    """One run for all tests that leave it as they found it."""
    return begun(shell, SPEC)


@pytest.fixture(scope="module")
def actor(run: Run) -> Role:
    return run.role("actor")


@pytest.fixture
def one(actor: Role) -> Worker:
    return actor.worker(0)


def until(condition: Callable[[], Any]) -> None:
    """Wait for what another process brings about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# --- calls -------------------------------------------------------------------------------------------------


def test_each_worker_has_an_object_made_with_the_specs_arguments(actor: Role) -> None:
    before = actor.call("add", 0)
    assert actor.call("add", amount=5) == [total + 5 for total in before]
    assert actor.call("pid") == [worker.view.pid for worker in actor.workers]
    assert actor.call("environment", "GREETING") == ["hello", "hello"]
    assert [worker.name for worker in actor.workers] == ["actor/0", "actor/1"]


def test_calls_are_scattered(actor: Role) -> None:
    assert actor.scatter("echo", ["a", "b"]) == ["a", "b"]
    assert actor.scatter("both", ["a", "b"], k=1) == [[["a"], {"k": 1}], [["b"], {"k": 1}]]
    assert actor.scatter("both", [(1, 2), ([3],)]) == [[[1, 2], {}], [[[3]], {}]]
    with pytest.raises(UsageError, match="2 workers, and there are 3 arguments"):
        actor.scatter("echo", [1, 2, 3])


def test_values_travel_as_they_are(one: Worker) -> None:
    sample = Sample("p", [1.5], {"c": Colour.RED, "t": (1, {2})})
    assert one.call("echo", sample) == sample
    assert one.call("both", 1, (2,), k={3: b"x"}) == [[1, (2,)], {"k": {3: b"x"}}]
    for size in (10, 10_000, 3_000_000):
        array = numpy.arange(size)
        back = one.call("echo", array)
        assert numpy.array_equal(back, array)
        back[0] = 7  # it is the caller's own
    data = os.urandom(3_000_000)
    assert one.call("echo", data) == data


def test_what_was_passed_may_be_changed_at_once(one: Worker) -> None:
    arrays = [numpy.full(50_000 * (k % 9 + 1), k) for k in range(40)]
    futures = []
    for array in arrays:
        futures.append(one.submit("echo", array))
        array[:] = -1
    for number, future in enumerate(futures):
        assert (future.result(PATIENCE) == number).all()


def test_arrays_that_are_held_are_not_written_over(one: Worker) -> None:
    held = [one.call("echo", numpy.full(100_000, number)) for number in range(100)]  # more than there are blocks
    for number, array in enumerate(held):
        assert (array == number).all()


def test_a_view_of_an_array_keeps_its_memory(one: Worker) -> None:
    parts = []
    for number in range(20):
        whole = one.call("echo", numpy.full(100_000, number))
        parts.append(memoryview(whole)[500:600])
        del whole
    assert [part[0] for part in parts] == list(range(20))


def test_futures_are_many_at_once(one: Worker) -> None:
    begin = one.call("add", 0)
    futures = [one.submit("add", 1) for _ in range(2000)]
    assert [future.result(PATIENCE) for future in futures] == list(range(begin + 1, begin + 2001))


def test_a_forked_process_calls_by_connections_of_its_own(one: Worker) -> None:
    assert one.call("echo", "parent") == "parent"
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sending.send([one.call("echo", number) for number in range(50)]))
    child.start()
    assert [one.call("echo", number) for number in range(50, 100)] == list(range(50, 100))
    assert receiving.poll(PATIENCE)
    assert receiving.recv() == list(range(50))
    child.join(PATIENCE)
    assert child.exitcode == 0


def test_calls_go_by_tls_where_there_is_no_other_way(run: Run) -> None:
    far = run.role("actor").worker(1)
    far.view.endpoints[:] = [endpoint for endpoint in far.view.endpoints if endpoint.startswith("tls://")]
    array = numpy.arange(1_000_000)
    assert numpy.array_equal(far.call("echo", array), array)
    assert [future.result(PATIENCE) for future in [far.submit("echo", n) for n in range(300)]] == list(range(300))
    assert list(far.stream("counts", 100)) == list(range(100))


def test_threads_share_a_worker(one: Worker) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda number: one.call("echo", number), range(400)))
    assert results == list(range(400))


def test_sync_methods_all_run_in_the_thread_that_made_the_object(one: Worker) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: one.call("own_thread"), range(20)))


def test_async_methods_run_side_by_side_and_while_a_sync_one_does(one: Worker, tmp_path: Path) -> None:
    waiting = [one.submit("waits", str(tmp_path / "a")) for _ in range(20)]
    blocked = one.submit("blocks", str(tmp_path / "b"))
    behind = one.submit("echo", "behind")
    until((tmp_path / "b.began").exists)
    health = one.health()["engines"][0]
    assert (health["method"], health["waiting"]) == ("blocks", 1)
    assert one.call("grows", 0) >= 0  # async: it need not wait for the sync one
    assert not behind.done()
    (tmp_path / "a").touch()
    assert [future.result(PATIENCE) for future in waiting] == ["done"] * 20
    (tmp_path / "b").touch()
    assert (blocked.result(PATIENCE), behind.result(PATIENCE)) == ("done", "behind")


async def test_calls_can_be_awaited(actor: Role, one: Worker) -> None:
    assert await actor.acall("echo", 3) == [3, 3]
    assert await actor.ascatter("echo", [1, 2]) == [1, 2]
    assert await asyncio.gather(*(one.acall("echo", number) for number in range(100))) == list(range(100))
    assert [item async for item in one.astream("acounts", 100)] == list(range(100))


def test_an_engine_calls_others(run: Run, actor: Role) -> None:
    run.fork("reference")
    assert run.role("reference").worker(0).call("neighbours", "actor") == actor.call("pid")
    run.stop("reference")


async def test_sync_calls_work_within_a_running_loop(actor: Role) -> None:
    assert actor.call("echo", "from a notebook") == ["from a notebook"] * 2


def test_a_callback_that_would_wait_for_ever_is_refused(one: Worker, tmp_path: Path) -> None:
    found: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def callback(future: concurrent.futures.Future[Any]) -> None:
        try:
            one.call("echo", 1)
        except UsageError as error:
            found.set_result(str(error))

    future = one.submit("blocks", str(tmp_path / "a"))
    future.add_done_callback(callback)
    (tmp_path / "a").touch()
    assert "cannot wait for a call" in found.result(PATIENCE)


# --- streams -----------------------------------------------------------------------------------------------


def test_generators_are_streamed(one: Worker) -> None:
    assert list(one.stream("counts", 1000)) == list(range(1000))
    assert list(one.stream("acounts", 1000)) == list(range(1000))
    assert list(one.stream("counts", 0)) == []


def test_a_stream_runs_ahead_only_a_little_and_lets_others_have_their_turn(one: Worker, tmp_path: Path) -> None:
    with one.stream("counts_forever", str(tmp_path / "closed")) as stream:
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
        until(lambda: one.call("add", 0) >= 31)
        assert one.call("add", 0) < 40
        assert [next(stream) for _ in range(200)] == list(range(3, 203))
    until((tmp_path / "closed").exists)


def test_a_loop_that_is_left_early_closes_the_generator(one: Worker, tmp_path: Path) -> None:
    for number in one.stream("counts_forever", str(tmp_path / "closed")):
        if number == 3:
            break
    until((tmp_path / "closed").exists)


async def test_and_so_does_one_in_an_event_loop(one: Worker, tmp_path: Path) -> None:
    async for number in one.astream("counts_forever", str(tmp_path / "closed")):
        if number == 3:
            break
    until((tmp_path / "closed").exists)


def test_a_stream_that_breaks_off_raises(one: Worker) -> None:
    stream = one.stream("breaks_off")
    assert next(stream) == 1
    with pytest.raises(Mishap, match="half way"):
        next(stream)
    assert list(stream) == []


def test_a_stream_is_no_call_and_a_call_no_stream(one: Worker) -> None:
    with pytest.raises(EngineError, match="is a generator"):
        one.call("counts", 3)
    with pytest.raises(EngineError, match="is no generator"):
        list(one.stream("echo", 3))
    with pytest.raises(EngineError, match="is a generator"):
        one.call("acounts", 3)
    with pytest.raises(EngineError, match="is no generator"):
        list(one.stream("grows", 3))


# --- failures ----------------------------------------------------------------------------------------------


def test_an_exception_comes_back_as_itself(one: Worker) -> None:
    with pytest.raises(Mishap) as caught:
        one.call("raises", 7)
    assert caught.value.code == 7
    assert str(caught.value) == "it broke (7)"
    cause = caught.value.__cause__
    assert isinstance(cause, RemoteTraceback)
    assert cause.worker == "actor/0"
    assert "In actor/0. Traceback" in str(cause)
    assert 'raise Mishap("it broke", code=code)' in str(cause)
    assert "slurmfork/engine" not in str(cause)
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        one.call("divides")
    assert one.call("echo", "still there") == "still there"


def test_arguments_that_do_not_fit_are_told_without_our_own_lines(one: Worker) -> None:
    for ask in (lambda: one.call("add", 1, 2, 3), lambda: one.create_engine("bad", "engine_classes:Engine", 1, 2, 3)):
        with pytest.raises(TypeError, match="takes from 1 to 2 positional arguments but 4 were given") as caught:
            ask()
        assert str(caught.value.__cause__).count('File "') == 1


def test_what_is_no_name_is_told_before_it_is_sent(one: Worker) -> None:
    number: Any = 3
    for ask in (
        lambda: one.call(number),
        lambda: one.call("echo", 1, engine=number),
        lambda: one.stream(number),
        lambda: one.create_engine(number, "engine_classes:Engine"),
        lambda: one.create_engine("new", number),
        lambda: one.remove_engine(number),
    ):
        with pytest.raises(UsageError, match="is a word, in quotes, not 3"):
            ask()


def test_what_cannot_be_raised_here_is_an_engine_call_error(one: Worker) -> None:
    with pytest.raises(EngineCallError, match="SystemExit: 3") as caught:
        one.call("exits")
    assert caught.value.kind == "builtins:SystemExit"


def test_an_exception_that_cannot_say_what_it_is_is_told_all_the_same(one: Worker) -> None:
    error = one.submit("speechless").exception(PATIENCE)
    assert isinstance(error, Speechless)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in speechless" in str(error.__cause__)


@pytest.mark.parametrize("timeout", [0, -1, "3", float("nan")])
def test_a_time_limit_is_a_number_of_seconds(actor: Role, timeout: Any) -> None:
    for ask in (actor.worker(0).call, actor.call, actor.scatter):
        with pytest.raises(UsageError, match="timeout is a number of seconds above 0"):
            ask("echo", [1, 2], timeout=timeout)


def test_a_path_that_names_no_class_is_told_before_it_is_sent(one: Worker) -> None:
    for path in ("engine_classes.Engine", "engine_classes:", ":Engine"):
        with pytest.raises(UsageError, match=r"names no class; write package\.module:Class"):
            one.create_engine("wrong", path)


def test_the_first_failure_of_many_is_raised(actor: Role) -> None:
    with pytest.raises(Mishap):
        actor.call("raises", 1)


def test_what_is_not_there_is_named(run: Run, one: Worker) -> None:
    for method in ("nothing", "_private", "__init__"):
        with pytest.raises(EngineNotFound, match=f"has no method '{method}'") as caught:
            one.call(method)
        assert caught.value.__cause__ is None  # no line of the user's is behind it
    with pytest.raises(EngineNotFound, match="did you mean 'echo'"):
        one.call("ecco", 1)
    for attribute in ("total", "broken"):  # the second is a property, which nobody asks for here
        with pytest.raises(EngineNotFound, match=f"'{attribute}' of engine_classes:Engine is no method"):
            one.call(attribute)
    with pytest.raises(EngineNotFound, match="engine 'x' of actor/0 is not there"):
        one.call("echo", 1, engine="x")
    with pytest.raises(UsageError, match="no worker of a role 'nobody'; there are actor, "):
        run.role("nobody")
    with pytest.raises(UsageError, match=r"it is declared, and run.fork\('late'\) starts it"):
        run.role("late")
    with pytest.raises(UsageError, match="hosts no engine"):
        run.role("other")
    with pytest.raises(UsageError, match="2 workers"):
        run.role("actor").worker(2)


def test_what_cannot_be_sent_back_is_the_calls_failure(one: Worker) -> None:
    with pytest.raises(
        CodecError, match=r"what unsendable of actor/0 returned: an instance of engine_classes\.Plain cannot be"
    ):
        one.call("unsendable")
    with pytest.raises(CodecError, match=r"engine_classes\.Plain cannot be sent"):
        one.call("echo", Plain())


def test_pickle_is_taken_only_where_the_spec_allows_it(run: Run, one: Worker) -> None:
    assert isinstance(one.call("echo", Plain(), codec="pickle"), Plain)
    with pytest.raises(CodecError, match=r"critic/\d takes no pickled calls"):
        run.role("critic").call("echo", 1, codec="pickle")
    with pytest.raises(UsageError, match="codec is None or 'pickle'"):
        one.call("echo", 1, codec="json")  # type: ignore[arg-type]


# --- giving up ---------------------------------------------------------------------------------------------


def test_an_async_method_is_cancelled(one: Worker, tmp_path: Path) -> None:
    future = one.submit("waits", str(tmp_path / "a"))
    until((tmp_path / "a.began").exists)
    assert future.cancel()
    until((tmp_path / "a.cancelled").exists)


def test_a_sync_method_is_told(one: Worker, tmp_path: Path) -> None:
    future = one.submit("blocks", str(tmp_path / "a"))
    queued = one.submit("blocks", str(tmp_path / "never"))
    until((tmp_path / "a.began").exists)
    assert queued.cancel()
    assert future.cancel()
    until((tmp_path / "a.cancelled").exists)
    assert one.call("echo", 1) == 1
    assert not (tmp_path / "never.began").exists()


def test_a_call_has_a_time_limit(one: Worker, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"actor/0 has not answered within 0\.1 s"):
        one.call("blocks", str(tmp_path / "a"), timeout=0.1)
    until((tmp_path / "a.cancelled").exists)


async def test_cancelling_a_task_cancels_its_call(one: Worker, tmp_path: Path) -> None:
    task = asyncio.create_task(one.acall("waits", str(tmp_path / "a")))
    while not (tmp_path / "a.began").exists():
        await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while not (tmp_path / "a.cancelled").exists():
        await asyncio.sleep(0.005)


# --- further engines ---------------------------------------------------------------------------------------


def test_engines_come_and_go_by_name(actor: Role) -> None:
    own = actor.call("add", 0)
    actor.create_engine("second", "engine_classes:Engine", 100, note="second")
    assert actor.call("add", engine="second") == [101, 101]
    assert actor.call("add", 0) == own
    assert actor.call("own_thread", engine="second") == [True, True]
    with pytest.raises(EngineError, match="has an engine 'second' already"):
        actor.create_engine("second", "engine_classes:Engine")
    actor.remove_engine("second")
    with pytest.raises(EngineNotFound):
        actor.call("add", engine="second")
    with pytest.raises(EngineNotFound):
        actor.remove_engine("second")


def test_an_engine_that_cannot_be_made_leaves_none(one: Worker) -> None:
    with pytest.raises(Mishap, match="told to fail"):
        one.create_engine("bad", "engine_classes:Engine", fail=True)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        one.create_engine("bad", "no_such_module:Engine")
    with pytest.raises(ImportError, match="has no 'Nothing'"):
        one.create_engine("bad", "engine_classes:Nothing")
    one.create_engine("bad", "engine_classes:Engine")
    one.remove_engine("bad")


def test_who_shares_a_process_is_reached_by_itself_in_a_namespace(tmp_path: Path) -> None:
    """Where its host takes itself for another PID than its node does."""
    shell = Shell(tmp_path)
    try:
        made = begun(
            shell,
            f"""
            name: inside
            backend: local
            isolation: {"namespace" if may_make_namespaces() else "none"}
            roles:
              actor: {{{ENGINE}}}
              critic: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}}}
            """,
        )
        critic = made.role("critic").worker(0)
        pid = critic.call("pid")
        actor = made.role("actor").worker(0)
        assert actor.call("pid") == pid
        assert critic.health()["pid"] == actor.health()["pid"] == actor.view.pid
        assert pid == actor.view.pid
        assert (own_pid(actor.view.pid) != pid) is may_make_namespaces()
    finally:
        shell.end()


def test_the_host_imports_nothing_heavy(run: Run) -> None:
    loaded = set(run.role("critic").worker(1).call("modules"))  # the first has been sent arrays
    assert "numpy" not in loaded or "numpy" in run.role("actor").worker(1).call("modules")
    assert not loaded & {"aiohttp", "click", "cryptography", "jinja2", "paramiko", "psutil", "rich", "yaml", "pickle5"}


# --- colocation --------------------------------------------------------------------------------------------


def test_roles_that_share_refer_to_the_same_process(run: Run, actor: Role) -> None:
    critic = run.role("critic")
    assert critic.call("pid") == actor.call("pid")
    assert [worker.view.target for worker in critic.workers] == ["actor/0", "actor/1"]
    assert [worker.view.gpus for worker in critic.workers] == [worker.view.gpus for worker in actor.workers]
    total = actor.call("add", 0)
    assert critic.call("add", 1000) != [1000 + before for before in total]  # an object of its own
    critic.create_engine("same", "engine_classes:Engine", 1)
    actor.create_engine("same", "engine_classes:Engine", 2)  # names are the role's own, too
    assert (critic.call("add", engine="same"), actor.call("add", engine="same")) == ([2, 2], [3, 3])
    critic.remove_engine("same")
    actor.remove_engine("same")


def test_a_role_may_be_forked_into_its_targets_processes(run: Run, actor: Role) -> None:
    made = run.fork("late")
    assert [view.pid for view in made] == actor.call("pid")
    late = run.role("late")
    assert late.call("add") == [1, 1]
    assert run.stop("late").survivors == 0
    with pytest.raises((EngineNotFound, WorkerFailed)):
        late.call("add")
    assert actor.call("echo", 1) == [1, 1]
    assert run.fork("late", target="actor/1")[0].target == "actor/1"
    run.stop("late")


def test_forked_roles_have_processes_of_their_own(run: Run, actor: Role) -> None:
    children = run.fork("reference")
    reference = run.role("reference")
    pids = reference.call("pid")
    assert [child.pid for child in children] == pids
    assert not set(pids) & set(actor.call("pid"))
    assert [child.target for child in children] == ["actor/0", "actor/1"]
    assert reference.call("environment", "GREETING") == ["hello", "hello"]  # its target's
    devices = actor.call("environment", "CUDA_VISIBLE_DEVICES")
    assert reference.call("environment", "CUDA_VISIBLE_DEVICES") == devices == ["0", "1"]
    ports = actor.call("environment", "SLURMFORK_PORTS")
    assert len(set(ports)) == 2
    assert reference.call("environment", "SLURMFORK_PORTS") == ["", ""]
    assert run.stop("reference").survivors == 0
    assert not [pid for pid in pids if process.identify(pid)]
    assert actor.call("echo", "lives") == ["lives", "lives"]  # a child's end is not its target's


def test_a_fork_beside_one_target(run: Run) -> None:
    (child,) = run.fork("reference", target="actor/1")
    assert (child.target, child.worker) == ("actor/1", "reference/0")
    assert run.role("reference").worker(0).call("environment", "SLURMFORK_TARGET") == "actor/1"
    run.stop("reference")


def test_a_fork_that_fails_leaves_nothing(run: Run, shell: Shell) -> None:
    before = set(shell.pids(run.run_id))
    with pytest.raises(Refused) as caught:
        run.fork("reference", env={"PYTHONPATH": "/nowhere", "PYTHONSTARTUP": "", "PYTHONHOME": "/nowhere"})
    assert caught.value.kind == "start_failed"
    assert [view.exit_status for view in caught.value.detail if view.exit_status] != []  # type: ignore[attr-defined]
    assert set(shell.pids(run.run_id)) <= before
    assert run.workers("reference") == []


def test_what_a_fork_of_an_engine_does_not_take(run: Run) -> None:
    with pytest.raises(Refused, match="no command can replace that"):
        run.fork("reference", command=["true"])
    with pytest.raises(Refused, match="whose environment is theirs"):
        run.fork("late", env={"A": "b"})


@pytest.mark.slurm
@pytest.mark.timeout(240)
def test_engines_on_slurm(minicluster: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = minicluster(nodes=2, gpus=1)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    text = f"""
    name: slurm
    nodes: 2
    slurm: {{gpus-per-node: 1}}
    roles:
      actor: {{per_node: 1, gpus: 1, {ENGINE}}}
      critic: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}}}
      reference: {{{ENGINE}, strategy: {{type: colocation, target: actor}}, autostart: false}}
    """
    try:
        run = begun(shell, text)
        actor = run.role("actor")
        assert len({worker.view.node for worker in actor.workers}) == 2
        assert len({worker.view.endpoints[1].rpartition(":")[0] for worker in actor.workers}) == 2
        for worker in actor.workers:
            worker.view.endpoints.reverse()  # as from a login node: by TLS
        array = numpy.arange(1_000_000)
        assert all(numpy.array_equal(array, back) for back in actor.call("echo", array))
        assert run.role("critic").call("pid") == actor.call("pid")
        run.fork("reference")
        assert run.role("reference").worker(1).call("neighbours", "actor") == actor.call("pid")
        assert run.cancel().survivors == 0
    finally:
        shell.end()
