"""Whatever is asked of head and agents, they answer, refuse what is wrong, and the run goes on unharmed.

Requests are made from the OpenAPI document (schemathesis), and from nothing at all (hypothesis), and go to a real run.
SLURMFORK_FUZZ_REQUESTS says how many in all, and then they are others each time.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from fuzzing import NO_REQUESTS, OWN, PATHS, Wire, harmless
from fuzzing import requests as any_requests
from hypothesis import HealthCheck, Phase, given, note, settings
from requests.adapters import HTTPAdapter
from running import Shell
from schemathesis import GenerationMode

from slurmfork import credentials
from slurmfork.head import openapi
from slurmfork.head.api import Api
from slurmfork.messages import ErrorReply
from slurmfork.run import Run
from slurmfork.rundir import HeadRecord
from slurmfork.scratch import node_directory

pytestmark = pytest.mark.timeout(1800)

REQUESTS = int(os.environ.get("SLURMFORK_FUZZ_REQUESTS", "2000"))
ANSWER_S = 60.0


def share(part: float) -> settings:
    """Settings for a part of the requests. Nothing is made smaller, which would take thousands more."""
    return settings(
        max_examples=max(1, round(REQUESTS * part)),
        derandomize="SLURMFORK_FUZZ_REQUESTS" not in os.environ,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- the run -----------------------------------------------------------------------------------------------


class Fuzzed:
    """The run that is asked; ``seen`` counts answers by what was asked and status."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.seen: Counter[tuple[str, int]] = Counter()
        record = run.rundir.read_record(run.rundir.head, HeadRecord)
        assert record is not None
        self.head_pid = record.pid
        self.address = f"{record.addresses[0]}:{record.port}"

    def head(self) -> socket.socket:
        """A connection to the head, under mutual TLS."""
        host, _, port = self.address.rpartition(":")
        context = credentials.client_context(self.run.rundir.credentials)
        raw = socket.create_connection((host, int(port)), ANSWER_S)
        return context.wrap_socket(raw, server_hostname=credentials.server_name(self.run.run_id))

    def agent(self) -> socket.socket:
        """A connection to the agent's socket."""
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        door.settimeout(ANSWER_S)
        door.connect(str(node_directory(self.run.run_id, "local0") / "agent.sock"))
        return door


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """A run. At the end it must be what it was, and end as if nothing had been."""
    shell = Shell(tmp_path_factory.mktemp("fuzz"))
    spec = shell.spec(
        """
        name: fuzz
        local: {gpus-per-node: 1}
        roles:
          rollout: {gpus: 1, command: [sleep, "1000"]}
          beside:
            strategy: {type: colocation, target: rollout}
            autostart: false
            on_failure: ignore
            command: [sleep, "1001"]
        """
    )
    run = Run.load(shell.ready(spec, "--backend", "local"), shell.root)
    try:
        fuzzed = Fuzzed(run)
        own, alive, held = run.workers(OWN), shell.pids(run.run_id), descriptors(fuzzed.head_pid)
        yield fuzzed
        for what, status in sorted(fuzzed.seen):
            print(f"{fuzzed.seen[what, status]:6} {status} {what}")
        print(f"{fuzzed.seen.total():6} in all")
        assert run.status().state == "ready", run.status().reason
        for role in {view.role for view in run.workers()} - {OWN}:
            assert run.stop(role).survivors == 0
        assert [(view.pid, view.state) for view in run.workers(OWN)] == [(view.pid, view.state) for view in own]
        assert sorted(shell.pids(run.run_id)) == sorted(alive)
        assert descriptors(fuzzed.head_pid) <= held + 5
        for log in (run.rundir.batch_log, run.rundir.agent_log("local0")):
            assert "Traceback" not in log.read_text()
        reply = run.cancel(reason="\x1b[31m\r\n" + "\u00fc" * 400)
        assert (reply.state, reply.survivors) == ("cancelled", 0)
    finally:
        shell.end()


# --- from the document -------------------------------------------------------------------------------------


def smaller(part: Any) -> Any:
    """A schema with lower limits: the making of texts of 128 KiB takes seconds for each."""
    if isinstance(part, list):
        return [smaller(item) for item in part]
    if not isinstance(part, dict):
        return part
    limits = {"maxLength": 300, "maxItems": 16}
    return {key: min(value, limits[key]) if key in limits else smaller(value) for key, value in part.items()}


DOCUMENT: dict[str, Any] = msgspec.to_builtins(openapi.document(Api.routes))
SCHEMA = schemathesis.openapi.from_dict(smaller(DOCUMENT))


def cases() -> Iterator[tuple[str, str, GenerationMode]]:
    """Each operation as it should be asked and as it should not; but for what cannot be wrong, or ends the run."""
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            if path != "/v1/cancel":
                yield path, method, GenerationMode.POSITIVE
            if operation.keys() & {"parameters", "requestBody"}:
                yield path, method, GenerationMode.NEGATIVE


CASES = list(cases())


class _ByName(HTTPAdapter):
    """Connects to an address, and expects the certificate of a name."""

    def __init__(self, name: str) -> None:
        self._name = name
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options, server_hostname=self._name, assert_hostname=self._name)


@pytest.fixture(scope="module")
def session(fuzzed: Fuzzed) -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        session.mount("https://", _ByName(credentials.server_name(fuzzed.run.run_id)))
        session.cert = str(fuzzed.run.rundir.credentials / "client.pem")
        yield session


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_the_api_does_what_its_document_says(
    fuzzed: Fuzzed, session: requests.Session, path: str, method: str, mode: GenerationMode
) -> None:
    """What fits is answered, what does not is refused, and every answer is one that the document has."""

    @share(0.4 / len(CASES))
    @given(SCHEMA[path][method.upper()].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.body = harmless(path, case.body)
        if str((case.query or {}).get("follow")).lower() in ("1", "true"):
            del case.query["follow"]  # the answer would have no end
        answer = case.call_and_validate(
            base_url=f"https://{fuzzed.address}",
            session=session,
            timeout=ANSWER_S,
            verify=str(fuzzed.run.rundir.credentials / "ca.pem"),
        )
        fuzzed.seen[f"{path}, {mode.value}", answer.status_code] += 1

    ask()


# --- from nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("door", "part"), [pytest.param("head", 0.6, id="head"), pytest.param("agent", 0.1, id="agent")]
)
def test_any_request_is_answered(fuzzed: Fuzzed, door: str, part: float) -> None:
    wire = Wire(getattr(fuzzed, door))

    @share(part)
    @given(any_requests())
    def ask(request: tuple[str, bytes, bytes]) -> None:
        method, target, text = request
        note(f"{text!r}")
        status, kind, answer = wire.ask(text, method)
        path = target.decode(errors="replace")
        fuzzed.seen[f"{door}, {path if path in PATHS else 'anything'}", status] += 1
        assert status < 500, answer
        if kind != "application/json" or method == "HEAD":
            return
        if status >= 400:
            error = msgspec.json.decode(answer, type=ErrorReply).error
            assert error
            assert error.isprintable()
        else:
            json.loads(answer)

    ask()
    wire.close()


@pytest.mark.parametrize("door", ["head", "agent"])
def test_what_is_no_request_is_answered_or_hung_up_on(fuzzed: Fuzzed, door: str) -> None:
    """Lines that are none, bodies that are not as long as they say, chunks that are none."""

    @share(0.03)
    @given(NO_REQUESTS)
    def send(text: bytes) -> None:
        note(f"{text!r}")
        status = 0
        with getattr(fuzzed, door)() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(text)
            response = http.client.HTTPResponse(connection)
            response.begin()
            status = response.status
        fuzzed.seen[f"{door}, no request", status] += 1
        assert status < 500

    send()
