"""Workers of a real agent: how they start, become ready, fail, are restarted, and what they find."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_rig import Rig, opened, order, python
from processes import wait_until

from slurmfork import journal, process
from slurmfork.errors import Refused
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import ReserveOrder, SignalOrder
from slurmfork.spec.model import Ready, Restart, Stop

SLEEP = ["sleep", "300"]
NOTIFY = """
import os, socket, sys, time
def say(text):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.sendto(text.encode(), os.environ["NOTIFY_SOCKET"])
"""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


def views_of(error: Refused) -> list[WorkerView]:
    import msgspec

    assert isinstance(error.detail, msgspec.Raw)
    return msgspec.json.decode(error.detail, type=list[WorkerView])


# --- starts


async def test_an_agent_joins_and_says_what_it_has(rig: Rig) -> None:
    end = await rig.agent(devices="4,5")
    assert end.join.node == "n0"
    assert end.join.address == "127.0.0.1"
    assert end.join.devices == [4, 5]
    assert end.join.guardian_pid == rig.guardians["n0"].pid
    assert end.join.agent_pid in process.children(end.join.guardian_pid)
    assert end.join.cpus == len(os.sched_getaffinity(0))


async def test_a_worker_runs_as_itself_in_a_session_of_its_own(rig: Rig) -> None:
    await rig.agent(devices="4,5,6")
    [view] = await rig.start(order("a/2", SLEEP, devices=[0, 2], rank=2, ports=2))
    assert view.state is WorkerState.RUNNING
    assert view.pid is not None
    assert (view.gpus, len(view.ports), view.rank, view.node) == ([4, 6], 2, 2, "n0")
    assert Path(f"/proc/{view.pid}/exe").resolve().name == "sleep"
    assert os.getsid(view.pid) == view.pid
    found = process.environ(view.pid) or {}
    assert found["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert found["SLURMFORK_PORTS"] == ",".join(map(str, view.ports))
    assert os.readlink(f"/proc/{view.pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{view.pid}/fd/1") == os.readlink(f"/proc/{view.pid}/fd/2") == view.log
    listing = f"/proc/{view.pid}/fd"  # for a moment the loader's files are among them
    wait_until(lambda: sorted(os.listdir(listing)) == ["0", "1", "2"], "no other descriptor")


async def test_output_goes_to_a_private_log_and_placeholders_are_filled(rig: Rig) -> None:
    await rig.agent()
    command = python("import os, sys; print(sys.argv[1:]); print(os.environ['TMPDIR'], file=sys.stderr)")
    words = ["{index}", "{role}", "{worker}", "{node}", "{run_id}", "{{port}}", "${port}"]
    await rig.start(order("a/7", [*command, *words]))
    await rig.state("a/7", WorkerState.EXITED)
    first, second = await rig.printed("a/7", lines=2)
    assert sorted((first, second))[1] == str(["7", "a", "a/7", "n0", rig.run_id, "{port}", "${port}"])
    assert sorted((first, second))[0].startswith(str(rig.local()))
    assert rig.rundir.worker_log("a", 7).stat().st_mode & 0o777 == 0o600


async def test_a_string_without_shell_syntax_gets_no_shell(rig: Rig) -> None:
    await rig.agent()
    views = await rig.start(
        order("plain/0", "sleep 300"),
        order("expanding/0", "sleep $DURATION", env={"DURATION": "300"}),
        order("compound/0", "sleep 300; true"),
    )
    pids = [view.pid for view in views]
    for pid in pids[:2]:
        await rig.until(lambda pid=pid: Path(f"/proc/{pid}/exe").resolve().name == "sleep", "the exec")
    assert Path(f"/proc/{pids[2]}/cmdline").read_bytes().startswith(b"bash\0")


async def test_every_start_is_in_the_journal_before_it_is_answered(rig: Rig) -> None:
    await rig.agent()
    views = await rig.start(order("a/0", SLEEP), order("a/1", SLEEP))
    records = [one for one in journal.read(rig.rundir.journal("n0")) if not isinstance(one, journal.Note)]
    assert [type(record) for record in records[:4]] == [journal.Intent] * 2 + [journal.Started] * 2
    started = [record for record in records if isinstance(record, journal.Started)]
    assert [record.pid for record in started] == [view.pid for view in views]
    assert all(process.alive(record.identity) for record in started)
    await rig.stop("a/0")
    await rig.end()
    assert journal.living(journal.read(rig.rundir.journal("n0"))) == []


async def test_a_request_that_is_asked_twice_is_done_once(rig: Rig) -> None:
    await rig.agent()
    one, other = await asyncio.gather(
        rig.start(order("a/0", SLEEP), request="same"), rig.start(order("a/0", SLEEP), request="same")
    )
    later = await rig.start(order("a/0", SLEEP), request="same")
    assert one[0].pid == other[0].pid == later[0].pid
    records = journal.read(rig.rundir.journal("n0"))
    assert sum(isinstance(record, journal.Started) for record in records) == 1


async def test_a_name_that_lives_is_taken_and_one_that_is_over_is_not(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", SLEEP))
    with pytest.raises(Refused, match="a/0 runs already") as refused:
        await rig.start(order("a/0", SLEEP))
    assert refused.value.kind == "in_use"
    await rig.stop("a/0")
    [view] = await rig.start(order("a/0", SLEEP))
    assert view.state is WorkerState.RUNNING


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"command": ["trian.py"]}, "command not found: trian.py"),
        ({"command": "trian.py --fast"}, "command not found: trian.py"),
        ({"command": ["/etc/passwd"]}, "not executable: /etc/passwd"),
        ({"command": SLEEP, "cwd": "/nowhere"}, "working directory does not exist: /nowhere"),
        ({"command": ["serve", "{port}"]}, "reserves no ports"),
        ({"command": SLEEP, "devices": [1]}, "device 1 was asked for, the node was granted 1"),
        ({"command": SLEEP, "stop": Stop(signal="NONSENSE")}, "there is no signal NONSENSE"),
    ],
)
async def test_one_that_cannot_start_takes_the_whole_order_back(
    rig: Rig, fields: dict[str, object], reason: str
) -> None:
    await rig.agent(devices="0")
    bad = order("bad/0", fields.pop("command"), **fields)  # type: ignore[arg-type]
    with pytest.raises(Refused) as refused:
        await rig.start(order("good/0", SLEEP), bad, order("good/1", SLEEP))
    assert refused.value.kind == "start_failed"
    assert f"bad/0: {reason}" in str(refused.value) or reason in str(refused.value)
    views = {view.worker: view for view in views_of(refused.value)}
    assert views["bad/0"].state is WorkerState.FAILED
    assert reason in views["bad/0"].reason
    assert views["good/0"].state is views["good/1"].state is WorkerState.STOPPED
    assert await rig.ask("views", None, list[WorkerView]) == []
    await rig.until(lambda: rig.below() == [], "the others to be stopped")
    assert (await rig.start(order("good/0", SLEEP)))[0].state is WorkerState.RUNNING


async def test_a_script_without_its_interpreter_is_named(rig: Rig, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    (tmp_path / "text").write_text("echo\n")
    (tmp_path / "text").chmod(0o755)
    await rig.agent()
    with pytest.raises(Refused, match="interpreter that its first line names does not exist"):
        await rig.start(order("a/0", [str(script)]))
    with pytest.raises(Refused, match="neither a program"):
        await rig.start(order("a/0", ["./text"], cwd=str(tmp_path)))


async def test_what_cannot_be_journaled_is_not_started_and_nothing_else_suffers(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", SLEEP), order("a/1", SLEEP))
    agent = rig.agents["n0"].join.agent_pid
    size = rig.rundir.journal("n0").stat().st_size
    resource.prlimit(agent, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    with pytest.raises(Refused, match=r"b/0: the journal cannot be written: .*File too large") as refused:
        await rig.start(order("b/0", SLEEP))
    assert refused.value.kind == "start_failed"
    process.send(process.identify(rig.agents["n0"].views["a/0"].pid or 0), signal.SIGKILL)  # type: ignore[arg-type]
    await rig.state("a/0", WorkerState.FAILED)
    resource.prlimit(agent, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    await rig.start(order("b/0", SLEEP))
    states = {view.worker: view.state for view in await rig.ask("views", None, list[WorkerView])}
    assert states == {"a/0": WorkerState.FAILED, "a/1": WorkerState.RUNNING, "b/0": WorkerState.RUNNING}


async def test_a_journal_that_is_no_plain_file_ends_the_agent(rig: Rig) -> None:
    rig.rundir.journal("n0").symlink_to("/dev/full")
    rig.launch()
    assert await rig.gone() == 1
    assert "Traceback" not in rig.rundir.agent_log("n0").read_text()


# --- what they do by themselves


@pytest.mark.parametrize(
    ("command", "state", "status", "reason"),
    [
        (["true"], WorkerState.EXITED, 0, ""),
        (["sh", "-c", "exit 3"], WorkerState.FAILED, 3, "exited with 3"),
        (["sh", "-c", "kill -SEGV $$"], WorkerState.FAILED, 139, "killed by SIGSEGV"),
        (["sh", "-c", "kill -KILL $$"], WorkerState.FAILED, 137, "killed by SIGKILL (out of memory?)"),
        (
            "nothing-like-this; nothing-like-that",
            WorkerState.FAILED,
            127,
            "exited with 127 (command not found?)",
        ),
    ],
)
async def test_an_exit_is_told_at_once_with_status_and_reason(
    rig: Rig, command: list[str] | str, state: WorkerState, status: int, reason: str
) -> None:
    await rig.agent()
    await rig.start(order("a/0", command))
    view = await rig.state("a/0", state)
    assert (view.exit_status, view.reason, view.pid) == (status, reason, None)


async def test_a_failure_brings_the_end_of_its_own_log(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", ["echo", "from before"]))
    await rig.state("a/0", WorkerState.EXITED)
    await rig.start(order("a/0", python("for n in range(5000): print('line', n)\nraise SystemExit(1)")))
    view = await rig.state("a/0", WorkerState.FAILED)
    lines = view.log_tail.splitlines()
    assert lines[-1] == "line 4999"
    assert len(lines) == 20
    await rig.start(order("a/0", ["false"]))
    view = await rig.view("a/0", lambda view: view.state is WorkerState.FAILED and view.log_tail == "")
    assert "line 4999" in rig.log("a/0")  # appended to, not replaced


async def test_a_failed_worker_is_restarted_with_growing_pauses_the_same_ports_and_log(rig: Rig) -> None:
    await rig.agent()
    command = python("import os; print(os.environ['SLURMFORK_PORTS'], flush=True); raise SystemExit(4)")
    restart = Restart(policy="on-failure", max=2, backoff=0.05)
    [view] = await rig.start(order("a/0", command, ports=1, restart=restart))
    view = await rig.state("a/0", WorkerState.FAILED)
    assert (view.restarts, view.exit_status) == (2, 4)
    assert len(set(rig.log("a/0").split())) == 1
    assert len(rig.log("a/0").split()) == 3
    reasons = [reason for _, state, reason in rig.agents["n0"].history if state is WorkerState.RESTARTING]
    assert reasons == [
        "exited with 4; restart 1 of 2 in 0.05 s",
        "exited with 4; restart 2 of 2 in 0.1 s",
    ]


async def test_a_restart_waits_until_what_the_last_one_left_is_gone(rig: Rig, tmp_path: Path) -> None:
    script = tmp_path / "worker.sh"
    script.write_text(
        f"if [ -e {tmp_path}/child ]; then kill -0 $(cat {tmp_path}/child) 2>/dev/null && echo alive || echo gone;"
        f" exec sleep 300; fi\nsetsid sleep 300 & echo $! > {tmp_path}/child\nexit 1\n"
    )
    await rig.agent()
    restart = Restart(policy="on-failure", max=1, backoff=0.0)
    await rig.start(order("a/0", ["bash", str(script)], restart=restart))
    await rig.view("a/0", lambda view: view.restarts == 1 and view.state is WorkerState.RUNNING)
    assert await rig.printed("a/0") == ["gone"]


async def test_always_restarts_a_good_exit_too_and_a_stop_ends_that(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", ["true"], restart=Restart(policy="always", max=1000, backoff=30)))
    await rig.state("a/0", WorkerState.RESTARTING)
    [result] = await rig.stop("a/0")
    assert result.survivors == []
    assert rig.agents["n0"].views["a/0"].state is WorkerState.STOPPED


# --- readiness


async def test_ready_by_notify_with_a_status_line(rig: Rig) -> None:
    await rig.agent()
    command = python(NOTIFY + "say('STATUS=loading'); time.sleep(.5); say('READY=1\\nSTATUS=serving'); time.sleep(300)")
    [view] = await rig.start(order("a/0", command, ready=Ready(notify=True)))
    assert view.state is WorkerState.STARTING
    await rig.view("a/0", lambda view: view.reason == "loading" and view.state is WorkerState.STARTING)
    view = await rig.state("a/0", WorkerState.READY)
    assert view.reason == "serving"
    assert view.ready is not None


@pytest.mark.parametrize("kind", ["tcp", "http"])
async def test_ready_when_its_port_answers(rig: Rig, kind: str) -> None:
    await rig.agent()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
    ready = Ready(tcp=True) if kind == "tcp" else Ready(http="/")
    await rig.start(order("a/0", command, ports=1, ready=ready, cwd=str(rig.rundir.logs)))
    view = await rig.state("a/0", WorkerState.READY)
    with socket.create_connection(("127.0.0.1", view.ports[0]), 5):
        pass


async def test_an_answer_of_404_is_not_ready(rig: Rig) -> None:
    await rig.agent()
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", "{port}"]
    ready = Ready(http="/nowhere", timeout=2)
    await rig.start(order("a/0", command, ports=1, ready=ready, cwd=str(rig.rundir.logs)))
    view = await rig.state("a/0", WorkerState.FAILED)
    assert view.reason == "not ready within 2 s"
    assert "404" in view.log_tail


async def test_one_that_is_not_ready_in_time_is_stopped_and_says_why(rig: Rig) -> None:
    await rig.agent()
    command = python("print('waiting for godot', flush=True)\nimport time; time.sleep(300)")
    [view] = await rig.start(order("a/0", command, ready=Ready(notify=True, timeout=1)))
    pid = view.pid
    view = await rig.state("a/0", WorkerState.FAILED)
    assert view.reason == "not ready within 1 s"
    assert view.log_tail == "waiting for godot"
    await rig.view("a/0", lambda view: view.exit_status == 143)
    assert process.identify(pid or 0) is None


async def test_a_worker_may_ask_for_more_time(rig: Rig) -> None:
    await rig.agent()
    command = python(NOTIFY + "say('EXTEND_TIMEOUT_USEC=20000000'); time.sleep(1.5); say('READY=1'); time.sleep(300)")
    await rig.start(order("a/0", command, ready=Ready(notify=True, timeout=0.7)))
    await rig.state("a/0", WorkerState.READY)


async def test_one_that_ends_before_it_is_ready_has_failed_at_once(rig: Rig) -> None:
    await rig.agent()
    await rig.start(order("a/0", ["true"], ready=Ready(notify=True, timeout=300)))
    view = await rig.state("a/0", WorkerState.FAILED)
    assert (view.reason, view.exit_status) == ("exited with 0 before it was ready", 0)


# --- ports, signals


async def test_two_agents_of_one_host_give_out_different_ports(rig: Rig) -> None:
    await asyncio.gather(rig.agent("n0"), rig.agent("n1"))
    reserve = ReserveOrder(owner="head", count=20)
    answers = await asyncio.gather(*(rig.ask("reserve", reserve, list[int], node) for node in ("n0", "n1")))
    assert len({*answers[0], *answers[1]}) == 40


async def test_further_ports_are_the_workers_until_it_ends(rig: Rig) -> None:
    await rig.agent()
    [view] = await rig.start(order("a/0", SLEEP, ports=1))
    more = await rig.ask("reserve", ReserveOrder(owner="a/0", count=2), list[int])
    held = await rig.view("a/0", lambda view: len(view.ports) == 3)
    assert held.ports == view.ports + more
    with pytest.raises(Refused) as refused:
        await rig.ask("reserve", ReserveOrder(owner="a/0", count=60_000), list[int])
    assert refused.value.kind == "no_ports"


async def test_a_signal_reaches_the_worker_itself(rig: Rig) -> None:
    await rig.agent()
    command = python(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
        "print('here', flush=True)\nwhile True: time.sleep(1)"
    )
    await rig.start(order("a/0", command), order("b/0", SLEEP))
    await rig.printed("a/0")
    assert await rig.ask("signal", SignalOrder(workers=["a/0", "c/0"], signal="USR1"), list[str]) == ["a/0"]
    assert (await rig.printed("a/0", lines=2))[1] == "heard"
    with pytest.raises(Refused, match="no signal NOPE"):
        await rig.ask("signal", SignalOrder(workers=["a/0"], signal="NOPE"), list[str])


async def test_a_signal_to_the_whole_job_reaches_those_that_wait_for_it(rig: Rig) -> None:
    await rig.agent()
    command = python(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
        "print('here', flush=True)\nwhile True: time.sleep(1)"
    )
    await rig.start(order("a/0", command), order("b/0", SLEEP))
    await rig.printed("a/0")
    rig.guardians["n0"].send_signal(10)
    assert (await rig.printed("a/0", lines=2))[1] == "heard"
    views = {view.worker: view.state for view in await rig.ask("views", None, list[WorkerView])}
    assert views == {"a/0": WorkerState.RUNNING, "b/0": WorkerState.RUNNING}


async def test_no_secret_is_in_the_agents_log_or_journal(rig: Rig) -> None:
    await rig.agent()
    command = python("import os, json; print(json.dumps('TOKEN' in os.environ))")
    await rig.start(order("a/0", command, env={"TOKEN": "hunter2-hunter2"}))
    await rig.state("a/0", WorkerState.EXITED)
    assert json.loads((await rig.printed("a/0"))[0]) is True
    assert "hunter2" not in rig.rundir.agent_log("n0").read_text() + rig.rundir.journal("n0").read_text()
