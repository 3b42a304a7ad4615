"""The head's API against callers that it must refuse: nothing is started, and the run goes on unharmed."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from running import Shell

from slurmfork import credentials
from slurmfork.client import Client
from slurmfork.errors import Refused, Unreachable
from slurmfork.messages import ForkRequest, new_request_id
from slurmfork.run import Run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("api"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def run(shell: Shell) -> Run:
    spec = shell.spec(
        """
        name: api
        local: {gpus-per-node: 1}
        roles:
          rollout: {gpus: 1, command: [sleep, "1000"]}
        """
    )
    return Run.load(shell.ready(spec, "--backend", "local"), shell.root)


@pytest.fixture(autouse=True)
def unharmed(run: Run) -> Iterator[None]:
    """After each test the run is ready, its worker the same, and nothing was started."""
    before = [(view.worker, view.pid) for view in run.workers()]
    yield
    assert run.status().state == "ready"
    assert [(view.worker, view.pid) for view in run.workers()] == before


def post(run: Run, path: str, body: bytes, method: str = "POST") -> tuple[int, dict[str, Any]]:
    with run._head() as client:
        status, answer = client._exchange(method, path, body, 30, repeat=False)
    return status, json.loads(answer)


FORK = {"role": "x", "request_id": "r", "target": "rollout", "command": ["sleep", "1000"]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"fork"',
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({**FORK, "extra": 1}).encode(),
        json.dumps({**FORK, "count": "2"}).encode(),
        json.dumps({**FORK, "count": 0}).encode(),
        json.dumps({**FORK, "count": True}).encode(),
        json.dumps({**FORK, "count": 10**30}).encode(),
        json.dumps({**FORK, "role": "../x"}).encode(),
        json.dumps({**FORK, "role": "x\n"}).encode(),
        json.dumps({**FORK, "role": ""}).encode(),
        json.dumps({**FORK, "target": "rollout/-1"}).encode(),
        json.dumps({**FORK, "target": "rollout/0/0"}).encode(),
        json.dumps({**FORK, "command": []}).encode(),
        json.dumps({**FORK, "command": "sleep 1000"}).encode(),
        json.dumps({**FORK, "command": ["sleep\0"]}).encode(),
        json.dumps({**FORK, "env": {"A=B": "x"}}).encode(),
        json.dumps({**FORK, "env": {"A": 1}}).encode(),
        json.dumps({**FORK, "request_id": ""}).encode(),
        json.dumps({"role": "x"}).encode(),
    ],
)
def test_a_malformed_fork_is_refused(run: Run, body: bytes) -> None:
    status, answer = post(run, "/v1/fork", body)
    assert (status, answer["kind"]) == (400, "malformed")


@pytest.mark.parametrize(
    ("changes", "status", "kind"),
    [
        ({"target": "nobody"}, 404, "unknown"),
        ({"target": "rollout/7"}, 404, "unknown"),
        ({"role": "rollout"}, 409, "in_use"),
        ({"command": None}, 404, "unknown"),
        ({"command": ["no-such-program"]}, 422, "start_failed"),
    ],
)
def test_a_fork_that_cannot_be_is_refused_with_the_reason(
    run: Run, changes: dict[str, Any], status: int, kind: str
) -> None:
    body = {**FORK, "request_id": new_request_id()}
    found = post(run, "/v1/fork", json.dumps({**body, **changes}).encode())
    assert (found[0], found[1]["kind"]) == (status, kind), found
    assert found[1]["error"]


def test_a_body_that_is_too_large_is_refused(run: Run) -> None:
    status, answer = post(run, "/v1/fork", b'{"role": "' + b"x" * 2_000_000 + b'"}')
    assert (status, answer["kind"]) == (413, "too_large")


def test_a_signal_that_there_is_not_is_malformed(run: Run) -> None:
    status, answer = post(run, "/v1/signal", b'{"target": "rollout", "signal": "NONE"}')
    assert (status, answer["kind"]) == (400, "malformed")
    assert answer["error"] == "there is no signal NONE"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/health?x=1",
        "/v1/status?worker=0",
        "/v1/status?workers=no",
        "/v1/workers?role=..%2Fx",
        "/v1/events?since=x",
        "/v1/events?since=-1",
        "/v1/events?since=1&since=2",
        "/v1/events?follow=1&since=",
    ],
)
def test_a_malformed_query_is_refused(run: Run, path: str) -> None:
    status, answer = post(run, path, b"", "GET")
    assert (status, answer["kind"]) == (400, "malformed")


def test_the_document_is_served_as_it_is_in_docs(run: Run) -> None:
    status, answer = post(run, "/v1/openapi.json", b"", "GET")
    assert status == 200
    assert answer == json.loads((ROOT / "docs" / "openapi.json").read_text()), "run scripts/apidoc"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/fork", 405), ("POST", "/", 404), ("PUT", "/v1/status", 405)]
)
def test_other_paths_and_methods(run: Run, method: str, path: str, status: int) -> None:
    assert post(run, path, b"", method)[0] == status


def test_a_request_that_is_sent_twice_is_done_once(run: Run) -> None:
    request = ForkRequest(role="twice", request_id="twice-1", target="rollout", command=["sleep", "1000"])
    with run._head() as client:
        first, second = client.fork(request), client.fork(request)
        assert [view.pid for view in first.workers] == [view.pid for view in second.workers]
        with pytest.raises(Refused, match="another request"):
            client.fork(ForkRequest(role="other", request_id="twice-1", target="rollout", command=["true"]))
    assert run.stop("twice").survivors == 0
    forgotten = run.fork("twice", target="rollout", command=["sleep", "1000"])
    assert forgotten[0].pid != first.workers[0].pid, "a role that was stopped may be forked again"
    run.stop("twice")
    # leave the table as it was found
    with run._head() as client, pytest.raises(Refused):
        client.fork(ForkRequest(role="twice", request_id="gone", target="rollout", command=["no-such-program"]))


@contextlib.contextmanager
def connected(run: Run, context: ssl.SSLContext) -> Iterator[http.client.HTTPConnection]:
    """A connection of somebody with this TLS context; raises what the handshake raises."""
    with run._head() as client:
        address, port = client._addresses[0], client._port
    with socket.create_connection((address, port), 10) as raw:
        raw.settimeout(10)
        with context.wrap_socket(raw, server_hostname=credentials.server_name(run.run_id)) as tls:
            connection = http.client.HTTPConnection("head")
            connection.sock = tls
            yield connection


def connect(run: Run, context: ssl.SSLContext, path: str = "/v1/health") -> int:
    """The status that a stranger with this TLS context gets; raises what the handshake or the request raises."""
    with connected(run, context) as connection:
        connection.request("GET", path)
        return connection.getresponse().status


def test_who_asks_wrongly_is_told_what_a_path_takes(run: Run) -> None:
    with connected(run, credentials.client_context(run.rundir.credentials)) as connection:
        connection.request("PUT", "/v1/fork")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Allow"]) == (405, "POST")


def test_who_waits_before_the_body_is_told_to_go_on(run: Run) -> None:
    """As curl does for a large one; without an answer it waits a second."""
    with connected(run, credentials.client_context(run.rundir.credentials)) as connection:
        connection.sock.sendall(
            b"POST /v1/fork HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
        )
        assert connection.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sock.sendall(b"{}")
        assert connection.sock.recv(100).startswith(b"HTTP/1.1 400")


def test_metrics_are_what_prometheus_takes(run: Run) -> None:
    with connected(run, credentials.client_context(run.rundir.credentials)) as connection:
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert f'slurmfork_run_info{{run_id="{run.run_id}",state="ready"}} 1'.encode() in answer.read()


def test_nobody_gets_in_without_a_certificate(run: Run) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        connect(run, context)


def test_another_runs_certificate_is_not_believed(run: Run, tmp_path: Path) -> None:
    credentials.make(tmp_path / "other", "other-abc")
    context = credentials.client_context(tmp_path / "other")
    with pytest.raises(ssl.SSLError):
        connect(run, context)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
        connect(run, context)


def test_an_agents_certificate_is_no_clients(run: Run) -> None:
    assert connect(run, credentials.agent_context(run.rundir.credentials)) == 403


def test_plain_http_gets_no_answer(run: Run) -> None:
    with run._head() as client:
        address, port = client._addresses[0], client._port
    with socket.create_connection((address, port), 10) as raw:
        raw.sendall(b"GET /v1/health HTTP/1.1\r\nHost: head\r\n\r\n")
        assert not received(raw).startswith(b"HTTP")


def received(connection: socket.socket) -> bytes:
    """What comes next; nothing where the other side hangs up."""
    try:
        return connection.recv(100)
    except OSError:
        return b""


def test_a_client_cannot_join_as_an_agent(run: Run) -> None:
    """The link port takes agents only; a client's certificate is shown the door."""
    agent = run.status().nodes[0].agent_pid
    link = Path(f"/proc/{agent}/environ").read_bytes().split(b"\0")
    head = next(entry for entry in link if entry.startswith(b"SLURMFORK_HEAD=")).decode().partition("=")[2]
    host, _, port = head.partition(":")
    context = credentials.client_context(run.rundir.credentials)
    with (
        socket.create_connection((host, int(port)), 10) as raw,
        context.wrap_socket(raw, server_hostname=credentials.server_name(run.run_id)) as tls,
    ):
        tls.settimeout(10)
        tls.sendall(b'{"id":1,"op":"join","body":{}}\n')
        assert received(tls) == b""


def test_a_head_that_is_not_there_is_unreachable(run: Run) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(Unreachable), Client(["127.0.0.1"], port, run.rundir.credentials, run.run_id) as client:
        client.health()


@pytest.mark.parametrize("holder", ["ca", "head", "agent", "client"])
def test_a_clock_that_is_set_back_keeps_nobody_out(run: Run, holder: str) -> None:
    """What was issued by a clock that was right is valid by one that is years behind."""
    found = x509.load_pem_x509_certificate((run.rundir.credentials / f"{holder}.pem").read_bytes())
    assert found.not_valid_before_utc < datetime.now(timezone.utc) - timedelta(days=3650)
