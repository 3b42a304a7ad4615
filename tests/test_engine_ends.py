"""How engines end: by themselves, by a signal, with their host; and what those who wait for them are told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy
import pytest
from running import Shell
from test_engine_run import ENGINE, PATIENCE, begun, until

from slurmfork import process
from slurmfork.errors import EngineError, WorkerFailed


def spec(actor: str = "", more: str = "") -> str:
    return f"""
name: ends
backend: local
nodes: 1
local: {{gpus-per-node: 1}}
roles:
  keeper: {{command: [sleep, infinity]}}
  actor: {{{ENGINE}, on_failure: ignore{actor}}}
{more}
"""


SHARED = f"  critic: {{{ENGINE}, on_failure: ignore, strategy: {{type: colocation, target: actor, fork: false}}}}"
FORKED = f"  critic: {{{ENGINE}, on_failure: ignore, strategy: {{type: colocation, target: actor}}}}"


def test_a_death_fails_the_calls_in_flight_with_its_status_and_last_words(local: Shell, tmp_path: Path) -> None:
    run = begun(local, spec(more=SHARED))
    actor, critic = run.role("actor").worker(0), run.role("critic").worker(0)
    stream = actor.stream("counts_forever", str(tmp_path / "c"))
    assert next(stream) == 0
    in_flight = [
        actor.submit("waits", str(tmp_path / "a")),
        critic.submit("waits", str(tmp_path / "b")),
        actor.submit("dies", 41),
        actor.submit("echo", numpy.ones(100_000)),
    ]
    for future, worker in zip(in_flight, ("actor/0", "critic/0", "actor/0", "actor/0"), strict=True):
        error = future.exception(PATIENCE)
        assert isinstance(error, WorkerFailed), error
        assert (error.worker, error.exit_status) == (worker, 41)
        assert "the last word" in error.log_tail
    with pytest.raises(WorkerFailed, match="the last word") as caught:
        list(stream)
    assert (caught.value.worker, caught.value.exit_status) == ("actor/0", 41)
    with pytest.raises(WorkerFailed, match="exit status 41"):
        actor.call("echo", 1)
    with pytest.raises(WorkerFailed):
        run.role("critic")
    (view,) = run.workers("critic")
    assert (view.state, view.pid, view.exit_status) == ("failed", None, 41)
    assert run.status().state == "ready"


def test_a_kill_is_told_as_such(local: Shell) -> None:
    run = begun(local, spec())
    worker = run.role("actor").worker(0)
    began = time.monotonic()
    with pytest.raises(WorkerFailed, match="SIGKILL") as caught:
        worker.call("killed")
    assert caught.value.exit_status == 137
    assert time.monotonic() - began < 10


@pytest.mark.timeout(120)
def test_what_an_engine_has_forked_does_not_keep_its_death_from_callers(local: Shell, tmp_path: Path) -> None:
    """A loader, say, that has inherited the connection, and lives for as long as its grace."""
    run = begun(local, spec(", stop: {grace: 60}"))
    worker = run.role("actor").worker(0)
    waiting = worker.submit("waits", str(tmp_path / "a"))
    with pytest.raises(WorkerFailed, match="SIGKILL"):
        worker.call("forks_and_dies")
    assert isinstance(waiting.exception(PATIENCE), EngineError)


def test_a_host_that_is_started_again_has_its_guests_again(local: Shell) -> None:
    restart = ", restart: {policy: on-failure, max: 3, backoff: 0}"
    run = begun(local, spec(restart, SHARED))
    actor, critic = run.role("actor").worker(0), run.role("critic").worker(0)
    first = actor.call("pid")
    assert critic.call("add", 5) == 5
    with pytest.raises(WorkerFailed):
        actor.call("dies", 3)
    until(lambda: all(view.state == "ready" and view.restarts == 1 for view in run.workers() if view.role != "keeper"))
    second = actor.call("pid")  # the handle finds the new process by itself
    assert second != first
    assert critic.call("pid") == second
    assert critic.call("add", 0) == 0


def test_it_ends_in_order_of_a_signal(local: Shell, tmp_path: Path) -> None:
    run = begun(local, spec(", kwargs: {note: own}", SHARED))
    actor = run.role("actor").worker(0)
    actor.create_engine("more", "engine_classes:Engine", note="more")
    running = actor.submit("blocks", str(tmp_path / "a"))
    until((tmp_path / "a.began").exists)
    pid = actor.view.pid
    assert pid is not None
    os.kill(pid, signal.SIGTERM)
    until(lambda: _refuses(actor))
    (tmp_path / "a").touch()
    assert running.result(PATIENCE) == "done"
    until(lambda: process.identify(pid) is None)
    lines = (run.rundir.logs / "actor-0.log").read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("closed")) == ["closed ", "closed more", "closed own"]
    assert [view.state for view in run.workers("critic")] == ["exited"]


def _refuses(worker: object) -> bool:
    try:
        worker.call("grows", 0)  # type: ignore[attr-defined]
    except EngineError as error:
        return "is ending" in str(error)
    return False


def test_stopping_the_target_leaves_its_forked_children_alone(local: Shell) -> None:
    run = begun(local, spec(more=FORKED))
    critic = run.role("critic").worker(0)
    assert run.stop("actor").survivors == 0
    assert critic.call("echo", "alive") == "alive"
    assert [view.state for view in run.workers("actor")] == ["stopped"]
    assert run.stop("critic").survivors == 0


def test_stopping_the_target_takes_its_guests_along(local: Shell) -> None:
    run = begun(local, spec(more=SHARED))
    critic = run.role("critic").worker(0)
    assert run.stop("actor").survivors == 0
    until(lambda: [view.state for view in run.workers("critic")] == ["stopped"])
    with pytest.raises(WorkerFailed, match="actor/0, in whose process it was, is stopped"):
        critic.call("echo", 1)


def test_a_class_that_cannot_be_made_fails_the_run_with_its_traceback(local: Shell) -> None:
    text = f"name: bad\nbackend: local\nroles:\n  actor: {{{ENGINE}, kwargs: {{fail: true}}}}\n"
    with pytest.raises(AssertionError):
        begun(local, text)
    (view,) = local.ps(local.runs[-1])
    assert (view["state"], view["exit_status"]) == ("failed", 1)
    assert "Mishap: was told to fail (4)" in view["log_tail"]
    assert "slurmfork/engine" not in view["log_tail"]


def test_a_guest_that_cannot_be_made_fails_the_run_with_its_traceback(local: Shell) -> None:
    text = spec(more=SHARED.replace(", on_failure: ignore", ", kwargs: {fail: true}"))
    with pytest.raises(AssertionError):
        begun(local, text)
    view = next(view for view in local.ps(local.runs[-1]) if view["role"] == "critic")
    assert view["state"] == "failed"
    assert "Mishap: was told to fail (4)" in view["reason"]
    assert 'raise Mishap("was told to fail", code=4)' in view["log_tail"]


def test_a_constructor_that_takes_long_is_stopped_all_the_same(local: Shell) -> None:
    run_id = local.submit(local.spec(spec(", kwargs: {slow: 600}")))
    (local.directory / "engine_classes.py").write_bytes(Path(__file__).with_name("engine_classes.py").read_bytes())
    until(lambda: any(view["pid"] for view in local.ps(run_id, "actor")))
    assert local.json("cancel", run_id)["survivors"] == 0


def test_the_working_directory_and_pythonpath_hold_as_for_any_python(local: Shell, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "from_path.py").write_text("")
    (local.directory / "from_cwd.py").write_text("")
    (local.directory / "queue.py").write_text("raise SystemExit('a module of the user stands in for the library')")
    run = begun(local, spec(f", env: {{PYTHONPATH: {other}}}"))
    worker = run.role("actor").worker(0)
    assert worker.call("import_", "from_cwd") == str(local.directory / "from_cwd.py")
    assert worker.call("import_", "from_path") == str(other / "from_path.py")


@pytest.mark.parametrize("who", ["agent_pid", "guardian_pid"])
def test_nothing_is_left_when_those_are_killed_who_watch(local: Shell, who: str) -> None:
    run = begun(local, spec(more=SHARED + FORKED.replace("critic", "\n  forked")[2:]))
    worker = run.role("forked").worker(0)
    waiting = worker.submit("waits", str(local.directory / "a"))
    os.kill(getattr(run.status().nodes[0], who), signal.SIGKILL)
    assert isinstance(waiting.exception(PATIENCE), WorkerFailed)
    run.wait("done", timeout=PATIENCE)
    until(lambda: not local.left(run.run_id))


def test_memory_that_was_shared_is_gone_with_the_run(local: Shell) -> None:
    before = set(os.listdir("/dev/shm"))
    run = begun(local, spec())
    worker = run.role("actor").worker(0)
    held = [worker.call("echo", numpy.ones(1_000_000)) for _ in range(5)]
    assert run.cancel().survivors == 0
    assert set(os.listdir("/dev/shm")) <= before
    assert all(array.sum() == 1_000_000 for array in held)  # what the caller has, stays
    socket = next(line for line in worker.view.endpoints if line.startswith("unix:"))
    assert not Path(socket.removeprefix("unix:")).exists()


def test_an_engine_saves_itself_when_the_run_is_about_to_end(local: Shell, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    engine = f"engine: 'engine_classes:Saving', args: ['{saved}'], checkpoint: {{signal: USR1}}"
    run = begun(local, spec().replace("roles:\n", f"roles:\n  saver: {{{engine}}}\n"))
    saver = run.role("saver").worker(0)
    assert saver.call("step", 3, timeout=PATIENCE) == 3
    assert run.signal("saver", "USR1") == ["saver/0"]  # as the head does ahead of the time limit
    until(lambda: saved.exists() and saved.read_text() == "3\n")
    assert saver.call("step", 1, timeout=PATIENCE) == 4
