"""The agent's Unix socket, and what a worker asks through it: ``slurmfork.current()``."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from agent_rig import Rig, opened, order

from slurmfork.errors import Refused, Unreachable, UsageError
from slurmfork.messages import ErrorReply, ForkReply, ForkRequest, WorkerView
from slurmfork.names import WorkerState
from slurmfork.orders import ApiAnswer
from slurmfork.spec.model import Ready
from slurmfork.worker import CurrentWorker, _UnixConnection, current

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


def ask(path: Path, method: str, target: str, body: bytes = b"") -> tuple[int, Any]:
    """One request on the socket; blocking, so run it in a thread."""
    connection = _UnixConnection(str(path), 30.0)
    try:
        connection.request(method, target, body=body)
        response = connection.getresponse()
        return response.status, json.loads(response.read() or b"null")
    finally:
        connection.close()


async def door(rig: Rig, *request: Any) -> tuple[int, Any]:
    return await asyncio.to_thread(ask, rig.local() / "agent.sock", *request)


def worker_script(text: str) -> list[str]:
    """A worker that has the package, as users' programs have it."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport slurmfork\n{text}"]


async def test_health_is_answered_on_the_spot(rig: Rig) -> None:
    await rig.agent()
    status, body = await door(rig, "GET", "/v1/health")
    assert status == 200
    assert (body["ok"], body["run_id"], body["node"], body["head"]) == (True, rig.run_id, "n0", True)
    assert rig.calls == []


async def test_socket_and_directory_are_private(rig: Rig) -> None:
    await rig.agent()
    assert (rig.local() / "agent.sock").stat().st_mode & 0o777 == 0o600
    assert rig.local().stat().st_mode & 0o777 == 0o700


async def test_the_rest_goes_to_the_head_as_it_came_and_its_answer_back(rig: Rig) -> None:
    await rig.agent()
    rig.answer = ApiAnswer(status=409, body='{"error":"no","kind":"in_use"}')
    status, body = await door(rig, "POST", "/v1/fork?x=1", b'{"role":"eval"}')
    assert (status, body) == (409, {"error": "no", "kind": "in_use"})
    [call] = rig.calls
    assert (call.method, call.path, call.body, call.worker) == ("POST", "/v1/fork?x=1", '{"role":"eval"}', None)


async def test_a_body_beyond_the_limit_is_refused_and_the_next_is_not(rig: Rig) -> None:
    await rig.agent()
    status, body = await door(rig, "POST", "/v1/fork", b"x" * (1024 * 1024 + 1))
    assert (status, body["kind"]) == (413, "too_large")
    status, _ = await door(rig, "POST", "/v1/fork", b"x" * (1024 * 1024))
    assert status == 200
    assert len(rig.calls) == 1


async def test_nonsense_on_the_socket_harms_nobody(rig: Rig) -> None:
    await rig.agent()

    def babble() -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(str(rig.local() / "agent.sock"))
            client.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
            return client.recv(4096)

    assert b"400" in await asyncio.to_thread(babble)
    assert (await door(rig, "POST", "/v1/fork", b"\xff\xfe"))[0] == 400
    assert (await door(rig, "GET", "/v1/health"))[0] == 200


async def test_without_a_head_the_answer_says_so(rig: Rig) -> None:
    rig.welcome.lease = 10.0
    await rig.agent()
    rig.hang_up(deaf=True)
    await rig.until(lambda: "the head is lost" in rig.rundir.agent_log("n0").read_text(), "the loss to be seen")
    status, body = await door(rig, "GET", "/v1/status")
    assert (status, body["kind"]) == (503, "unreachable")
    assert (await door(rig, "GET", "/v1/health"))[1]["head"] is False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_turned_away_even_if_the_directory_were_open(rig: Rig) -> None:
    await rig.agent()
    path = rig.local() / "agent.sock"
    opened_up = (rig.local(), path)
    before = [place.stat().st_mode for place in opened_up]
    for place in opened_up:
        place.chmod(0o777)
    try:
        text = (
            f"import os, socket; s = socket.socket(socket.AF_UNIX); os.chdir({str(rig.local())!r});"
            "os.setgid(65534); os.setuid(65534);"  # already inside: what is above is closed to it, as it should be
            f"s.settimeout(30); s.connect('agent.sock'); s.sendall(b'GET /v1/health HTTP/1.0\\r\\n\\r\\n');"
            "print(s.recv(100))"
        )
        child = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", text, stdout=-1, stderr=-1)
        output, errors = await asyncio.wait_for(child.communicate(), 60)
    finally:
        for place, mode in zip(opened_up, before, strict=True):
            place.chmod(mode)
    assert output in (b"b''\n", b""), (output, errors)
    assert b"HTTP" not in output
    assert "user id 65534" in rig.rundir.agent_log("n0").read_text()


# --- slurmfork.current()


async def test_a_worker_knows_itself_and_says_when_it_is_ready(rig: Rig) -> None:
    await rig.agent(devices="0,1")
    text = (
        "me = slurmfork.current()\n"
        "print([me.name, me.role, me.index, me.run_id, me.node, me.target, me.rank, me.world_size, me.ports()])\n"
        "import sys; sys.stdout.flush()\n"
        "assert me.ready('serving\\nnow') is True\n"
        "import time; time.sleep(300)"
    )
    env = {"RANK": "5", "WORLD_SIZE": "8"}
    command = worker_script(text)
    await rig.start(order("a/5", command, ports=2, target="b/0", env=env, ready=Ready(notify=True)))
    view = await rig.state("a/5", WorkerState.READY)
    await rig.view("a/5", lambda view: view.reason == "serving now")
    assert (await rig.printed("a/5"))[0] == str(["a/5", "a", 5, rig.run_id, "n0", "b/0", 5, 8, view.ports])


async def test_a_worker_forks_beside_itself_and_the_head_knows_who_asked(rig: Rig) -> None:
    await rig.agent()
    child = WorkerView(worker="eval/0", role="eval", index=0, state=WorkerState.READY)
    rig.answer = ApiAnswer(status=200, body=msgspec.json.encode(ForkReply(workers=[child])).decode())
    text = "print([view.worker for view in slurmfork.current().fork('eval', env={'A': 'b'}, count=2)], flush=True)"
    await rig.start(order("a/0", worker_script(text)))
    assert await rig.printed("a/0") == ["['eval/0']"]
    [call] = rig.calls
    assert (call.method, call.path, call.worker) == ("POST", "/v1/fork", "a/0")
    request = msgspec.json.decode(call.body, type=ForkRequest)
    assert (request.role, request.target, request.count, request.env) == ("eval", "a/0", 2, {"A": "b"})


async def test_a_grandchild_in_a_session_of_its_own_is_still_the_workers(rig: Rig) -> None:
    await rig.agent()
    text = "slurmfork.current().stop('b', grace=1.5)"
    rig.answer = ApiAnswer(status=200, body='{"stopped":["b/0"],"survivors":0}')
    command = ["sh", "-c", 'setsid -w "$@"; sleep 300', "x", *worker_script(text)]
    await rig.start(order("a/0", command))
    await rig.until(lambda: bool(rig.calls), "the call")
    assert rig.calls[0].worker == "a/0"


async def test_refusals_arrive_with_their_kind_and_workers(rig: Rig) -> None:
    await rig.agent()
    failed = WorkerView(worker="eval/0", role="eval", index=0, state=WorkerState.FAILED, reason="exited with 3")
    reply = ErrorReply(error="eval/0: exited with 3", kind="start_failed", workers=[failed])
    rig.answer = ApiAnswer(status=422, body=msgspec.json.encode(reply).decode())
    me = CurrentWorker(
        {"SLURMFORK_WORKER": "a/0", "SLURMFORK_RUN_ID": "r", "SLURMFORK_AGENT": str(rig.local() / "agent.sock")}
    )
    with pytest.raises(Refused, match="exited with 3") as refused:
        await asyncio.to_thread(me.fork, "eval")
    assert refused.value.kind == "start_failed"
    assert refused.value.detail == [failed]
    await rig.end()
    with pytest.raises(Unreachable):
        await asyncio.to_thread(me.status)


def test_outside_of_a_worker_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURMFORK_WORKER", "SLURMFORK_AGENT", "SLURMFORK_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"not a worker of a run .*slurmfork\.Run\.load"):
        current()


def test_ready_without_anybody_who_asks_is_no_error() -> None:
    me = CurrentWorker({"SLURMFORK_WORKER": "a/0", "SLURMFORK_RUN_ID": "r", "SLURMFORK_AGENT": "/nowhere"})
    assert me.ready("x") is False
