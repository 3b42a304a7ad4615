"""Roles beside each other, by the scheduler API, on each backend: what is forked, what is shared, what is left."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import engine_classes
import pytest
from cluster import Factory
from ray_cluster import RayCluster
from running import Shell, command_of, environ_of

from slurmfork import Run, Scheduler, process
from slurmfork.errors import WorkerCreationError, WorkerFailed, WorkerNotFound

pytestmark = pytest.mark.timeout(1200)  # the first on Ray installs it

ENGINE = 'engine: "engine_classes:Engine"'
BESIDE = "strategy: {type: colocation, target: actor}, autostart: false"
SPEC = f"""
name: beside
nodes: 2
local: {{gpus-per-node: 2}}
slurm: {{gpus-per-node: 2}}
ray: {{gpus-per-node: 2}}
roles:
  actor: {{replicas: 4, gpus: 1, ports: 1, env: {{GREETING: hello}}, {ENGINE}, on_failure: ignore, autostart: false}}
  reference: {{ports: 2, env: {{OWN: "1"}}, {ENGINE}, {BESIDE}}}
  critic: {{{ENGINE}, strategy: {{type: colocation, target: actor, fork: false}}, autostart: false}}
  server: {{gpus: 2, {ENGINE}, {BESIDE}}}
  many: {{replicas: 8, {ENGINE}, {BESIDE}}}
  uneven: {{replicas: 3, {ENGINE}, {BESIDE}}}
  failing: {{kwargs: {{fail: true}}, {ENGINE}, {BESIDE}}}
"""


@pytest.fixture(
    scope="module",
    params=["local", pytest.param("slurm", marks=pytest.mark.slurm), pytest.param("ray", marks=pytest.mark.ray)],
)
def shell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A user's shell for one of the backends, of two nodes of two GPUs each."""
    directory = tmp_path_factory.mktemp(request.param)
    shutil.copy(engine_classes.__file__, directory)
    made = Shell(directory)
    if request.param == "slurm":
        minicluster: Factory = request.getfixturevalue("minicluster")
        made.env["SLURM_CONF"] = minicluster(nodes=2, gpus=2).env["SLURM_CONF"]
    elif request.param == "ray":
        cluster: RayCluster = request.getfixturevalue("ray_cluster")
        made = cluster.shell(directory, request.getfixturevalue("ray_python"))
    made.env["SLURMFORK_TEST_BACKEND"] = request.param
    yield made
    made.end()


@pytest.fixture(scope="module")
def scheduler(shell: Shell) -> Iterator[Scheduler]:
    """One run for all tests on a backend; nothing of it is left."""
    run_id = shell.submit(shell.spec(SPEC), "--backend", shell.env["SLURMFORK_TEST_BACKEND"])
    with pytest.MonkeyPatch.context() as patch:
        for name in {"SLURM_CONF"} & set(shell.env):
            patch.setenv(name, shell.env[name])
        with Scheduler(run=Run.load(run_id, shell.root)) as made:
            yield made
    assert shell.left(run_id) == []


@pytest.fixture
def actors(scheduler: Scheduler) -> Iterator[list[int]]:
    """PIDs of the targets; what a test puts beside them goes."""
    try:
        workers = scheduler.get_workers("actor")
    except WorkerNotFound:
        scheduler.create_workers("actor")
        workers = scheduler.get_workers("actor")
    yield [worker.pid or 0 for worker in workers]
    for role in {view.role for view in scheduler.run.workers() if view.state == "ready"} - {"actor"}:
        scheduler.delete_workers(role)


def alive(pids: list[int]) -> list[int]:
    """Those that run, of processes of any node: all nodes are on this machine."""
    return [pid for pid in pids if process.identify(pid)]


def test_a_forked_role_has_a_process_beside_each_target(scheduler: Scheduler, actors: list[int]) -> None:
    assert scheduler.fork_workers("reference", "actor") == [f"reference/{index}" for index in range(4)]
    children, targets = scheduler.get_workers("reference"), scheduler.get_workers("actor")
    assert len({target.node for target in targets}) == 2
    for child, target in zip(children, targets, strict=True):
        assert (child.target, child.node, child.gpus) == (target.id, target.node, target.gpus)
    pids = scheduler.role("reference").call("pid")
    assert pids == [child.pid for child in children]
    assert len({*pids, *actors}) == 8
    scheduler.fork_workers("proxy", "reference", command=["sleep", "1000"])  # beside what is itself forked: anything
    proxies = scheduler.get_workers("proxy")
    assert [(one.target, one.gpus) for one in proxies] == [(child.id, child.gpus) for child in children]
    assert {command_of(one.pid or 0)[0] for one in proxies} == {"sleep"}
    scheduler.delete_workers("reference")
    assert alive([one.pid or 0 for one in proxies]) == [one.pid for one in proxies]


def test_environment_devices_and_ports(scheduler: Scheduler, actors: list[int]) -> None:
    scheduler.fork_workers("reference", "actor", env={"MORE": "2"})
    children, targets = scheduler.get_workers("reference"), scheduler.get_workers("actor")
    for child, target in zip(children, targets, strict=True):
        inherited, given = environ_of(child.pid or 0), environ_of(target.pid or 0)
        assert (inherited["GREETING"], inherited["OWN"], inherited["MORE"]) == ("hello", "1", "2")
        assert "OWN" not in given
        assert inherited["CUDA_VISIBLE_DEVICES"] == given["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, target.gpus))
        assert inherited["SLURMFORK_PORTS"] == ",".join(map(str, child.ports))
        assert (inherited["RANK"], inherited["WORLD_SIZE"]) == (given["RANK"], "4")
    more = scheduler.allocate_ports("reference/3", 2)
    for node in {target.node for target in targets}:
        own = [port for one in [*children, *targets] if one.node == node for port in one.ports]
        own += more if children[3].node == node else []
        assert len(set(own)) == len(own) >= 6  # on each node, of two targets and two children
    scheduler.set_worker_env("actor/0", {"LATER": "x"})
    assert scheduler.role("actor").call("environment", "LATER") == ["x", None, None, None]
    assert scheduler.role("reference").call("environment", "LATER") == [None] * 4


def test_deleting_a_forked_role_ends_it_and_not_its_target(scheduler: Scheduler, actors: list[int]) -> None:
    scheduler.fork_workers("reference", "actor")
    children = scheduler.role("reference").call("pid")
    with pytest.raises(WorkerCreationError, match="role reference runs already") as caught:
        scheduler.fork_workers("reference", "actor")
    assert caught.value.kind == "in_use"
    scheduler.delete_workers("reference")
    assert alive(children) == []
    assert scheduler.role("actor").call("pid") == actors
    scheduler.fork_workers("reference", "actor")
    assert len(alive(scheduler.role("reference").call("pid"))) == 4


def test_deleting_the_target_with_children_alive(scheduler: Scheduler, actors: list[int]) -> None:
    scheduler.fork_workers("reference", "actor")
    children = scheduler.role("reference").call("pid")
    scheduler.delete_workers("actor")
    assert alive(actors) == []
    assert scheduler.role("reference").call("pid") == children
    with pytest.raises(WorkerNotFound, match="'actor'"):
        scheduler.create_workers("many")
    scheduler.delete_workers()
    assert alive(children) == []


def test_children_of_a_target_that_was_killed_are_still_to_be_ended(scheduler: Scheduler, actors: list[int]) -> None:
    scheduler.fork_workers("reference", "actor")
    children = scheduler.role("reference").call("pid")
    os.kill(actors[1], signal.SIGKILL)
    with pytest.raises(WorkerFailed, match=r"actor/1.*SIGKILL") as caught:
        scheduler.call_engine("actor/1", "echo", 1)
    assert caught.value.exit_status == 137
    assert scheduler.role("reference").call("pid") == children
    scheduler.delete_workers("reference")
    scheduler.delete_workers("actor")
    assert alive([*actors, *children]) == []
    with pytest.raises(WorkerNotFound, match="create_workers makes it"):  # the one that failed is deleted, too
        scheduler.get_workers("actor")


def test_counts_need_not_match(scheduler: Scheduler, actors: list[int]) -> None:
    assert scheduler.create_workers("server") == ["server/0", "server/1"]  # of two GPUs, beside four actors of one
    assert [one.target for one in scheduler.get_workers("server")] == ["actor/0", "actor/2"]
    assert {one.gpus for one in scheduler.get_workers("server")} == {(0, 1)}
    assert len(scheduler.create_workers("many")) == 8
    assert [one.target for one in scheduler.get_workers("many")] == [f"actor/{index // 2}" for index in range(8)]
    with pytest.raises(WorkerCreationError, match="which does not come out even") as caught:
        scheduler.create_workers("uneven")
    assert caught.value.kind == "misfit"


def test_a_fork_that_fails_leaves_nothing(scheduler: Scheduler, actors: list[int], shell: Shell) -> None:
    before = set(shell.pids(scheduler.run.run_id))
    with pytest.raises(WorkerCreationError, match="was told to fail") as caught:
        scheduler.create_workers("failing")
    assert (caught.value.kind, caught.value.workers[0].exit_status) == ("start_failed", 1)
    with pytest.raises(WorkerCreationError, match="no-such-command"):
        scheduler.fork_workers("router", "actor", command=["no-such-command"])
    assert set(shell.pids(scheduler.run.run_id)) <= before
    for role in ("failing", "router"):
        with pytest.raises(WorkerNotFound):
            scheduler.get_workers(role)


def test_roles_that_share_refer_to_the_same_process(scheduler: Scheduler, actors: list[int]) -> None:
    assert scheduler.create_workers("critic") == [f"critic/{index}" for index in range(4)]
    assert scheduler.role("critic").call("pid") == actors
    assert [one.pid for one in scheduler.get_workers("critic")] == actors
    scheduler.delete_workers("critic")
    assert scheduler.role("actor").call("pid") == actors  # which go on
    scheduler.create_workers("critic")
    scheduler.delete_workers("actor")
    with pytest.raises(WorkerNotFound):
        scheduler.get_workers("critic")  # which lived in their processes
