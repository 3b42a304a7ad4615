"""Whatever is asked of head and agents, they answer, refuse what is wrong, and the run goes on unharmed.

Requests are made from the OpenAPI document (schemathesis), and from nothing at all (hypothesis), and go to a real run.
SLURMFORK_FUZZ_REQUESTS says how many in all.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from running import Shell
from schemathesis import GenerationMode
from slurmfork.agent.scratch import node_directory

from slurmfork import credentials, names
from slurmfork.head import openapi
from slurmfork.head.api import Api
from slurmfork.messages import CancelRequest, ErrorReply
from slurmfork.run import Run
from slurmfork.rundir import HeadRecord

pytestmark = pytest.mark.timeout(1800)

REQUESTS = int(os.environ.get("SLURMFORK_FUZZ_REQUESTS", "2000"))
ANSWER_S = 60.0
OWN = "rollout"  # the run's own role; whatever is started by a request has another one, and sleeps
FORKED = ["beside", "one", "two"]


def share(part: float) -> settings:
    """Settings for a part of the requests. Nothing is made smaller, which would take thousands more."""
    return settings(
        max_examples=max(1, round(REQUESTS * part)),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# --- the run -----------------------------------------------------------------------------------------------


class Fuzzed:
    """The run that is asked; ``seen`` counts answers by path and status."""

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
          beside: {strategy: {type: colocation, target: rollout}, autostart: false, command: [sleep, "1001"]}
        """
    )
    run = Run.load(shell.ready(spec, "--backend", "local"), shell.root)
    try:
        fuzzed = Fuzzed(run)
        own, alive, held = run.workers(OWN), shell.pids(run.run_id), descriptors(fuzzed.head_pid)
        yield fuzzed
        for path, status in sorted(fuzzed.seen):
            print(f"{fuzzed.seen[path, status]:6} {status} {path}")
        assert run.status().state == "ready"
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


def harmless(path: str, body: Any) -> Any:
    """A request as it was made, but for what would do what it says: end the run, or fill this machine."""
    if not isinstance(body, dict):
        return body
    made = dict(body)
    if path != "/v1/fork":
        made.update({key: value.replace(OWN, "other") for key, value in made.items() if isinstance(value, str)})
    if isinstance(made.get("count"), (int, float)) and made["count"] >= 1:
        made["count"] = min(int(made["count"]), 2)  # nor is 1.0 a whole number here, as it is to JSON Schema
    command = made.get("command")
    if isinstance(command, list) and command and isinstance(command[0], str) and is_program(command[0]):
        made["command"] = ["sleep", "1002"]
    return made


def is_program(word: str) -> bool:
    with contextlib.suppress(ValueError):
        return shutil.which(word) is not None
    return False


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
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


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


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_the_api_does_what_its_document_says(
    fuzzed: Fuzzed, session: requests.Session, path: str, method: str, mode: GenerationMode
) -> None:
    """What fits is answered, what does not is refused, and every answer is one that the document has."""
    operation = SCHEMA[path][method.upper()]
    if mode is GenerationMode.NEGATIVE and not (operation.query or operation.body):
        pytest.skip("nothing can be wrong where nothing is asked")
    if mode is GenerationMode.POSITIVE and path == "/v1/cancel":
        pytest.skip("it would end the run; the fixture does so at the end")

    @share(0.4 / len(OPERATIONS) / 2)
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        case.body = harmless(path, case.body)
        case.query = {key: value for key, value in (case.query or {}).items() if key != "follow"}
        answer = case.call_and_validate(
            base_url=f"https://{fuzzed.address}",
            session=session,
            timeout=ANSWER_S,
            verify=str(fuzzed.run.rundir.credentials / "ca.pem"),
        )
        fuzzed.seen[path, answer.status_code] += 1

    ask()


# --- from nothing ------------------------------------------------------------------------------------------

TEXT = st.text(max_size=30)
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 5).flatmap(lambda number: usual if number else other)


ROLES = mostly(st.sampled_from(FORKED), st.from_regex(names.NAME_PATTERN, fullmatch=True))
WORKERS = mostly(st.sampled_from([*FORKED, *(f"{role}/0" for role in FORKED)]), ROLES)
COMMANDS = mostly(st.just(["sleep", "1003"]), st.lists(PLAIN, min_size=1, max_size=4))
IDS = st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True)
SECONDS = mostly(st.floats(10, 80_000), st.floats(0, 1e-3))
FIELDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "/v1/fork": {
        "role": ROLES,
        "request_id": IDS,
        "target": mostly(st.sampled_from([OWN, f"{OWN}/0"]), WORKERS),
        "count": st.integers(1, 2),
        "command": COMMANDS,
        "env": st.dictionaries(st.from_regex(names.ENV_PATTERN, fullmatch=True), PLAIN, max_size=3),
        "timeout": SECONDS,
    },
    "/v1/stop": {"target": WORKERS, "grace": SECONDS, "request_id": IDS},
    "/v1/signal": {"target": WORKERS, "signal": st.sampled_from(["TERM", "STOP", "USR1", "RTMIN+3", "KILL", "NONE"])},
    "/v1/ports": {"worker": WORKERS, "count": st.integers(1, 2)},
    "/v1/cancel": {"reason": PLAIN},
}
PATHS = [path for path, _ in OPERATIONS]


@st.composite
def filled(draw: st.DrawFn, path: str) -> bytes:
    """A body that may well do: one in three has a field that is wrong, left out, or too many."""
    fields = draw(st.fixed_dictionaries(FIELDS[path]))
    key = draw(st.sampled_from(sorted(fields)))
    wrong = draw(st.integers(0, 8))
    if wrong == 0:
        fields[key] = draw(JSON)
    elif wrong == 1:
        del fields[key]
    elif wrong == 2:
        fields[draw(TEXT)] = draw(JSON)
    return encoded(harmless(path, fields))


def encoded(body: Any) -> bytes:
    """As JSON, or as much as there is of it in a body that is none."""
    return json.dumps(body, ensure_ascii=False).encode(errors="surrogatepass")


@st.composite
def spoilt(draw: st.DrawFn, text: bytes) -> bytes:
    """Bytes of which some are others, or missing."""
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 3)) :]


BODIES = (
    st.binary(max_size=100) | JSON.map(encoded) | st.sampled_from([b"", b"[" * 5000, b"\xef\xbb\xbf{}", b'"\\ud800"'])
)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(["workers", "role", "since", "follow", "x"]) | TEXT,
        st.sampled_from(["0", "1", "true", "null", OWN, "9" * 40, "1e3"]) | TEXT,
    ),
    max_size=3,
).map(lambda pairs: "&".join(f"{key}={value}" for key, value in pairs).encode(errors="surrogatepass"))
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE", "get", "BREW"]
HEADERS = [
    b"Content-Type: text/plain; charset=\xff",
    b"Content-Encoding: gzip",
    b"Content-Encoding: br, zstd",
    b"Accept-Encoding: gzip",
    b"Expect: 100-continue",
    b"Connection: close",
    b"Connection: upgrade\r\nUpgrade: websocket",
    b"Range: bytes=5-2",
    b"If-None-Match: *",
    b"Cookie: " + b"a=b; " * 50,
    b"X-Forwarded-For: \x80\xff",
]


def line_of(method: str, path: bytes) -> bytes:
    """The first line of a request, with all that may not stand in it as percents."""
    return method.encode() + b" " + b"".join(b"%%%02X" % c if c <= 0x20 or c == 0x7F else bytes([c]) for c in path)


@st.composite
def asked(draw: st.DrawFn) -> tuple[str, bytes, list[bytes], bytes]:
    """Method, path, headers and body of a request that is one, whatever it asks."""
    path = draw(st.sampled_from([*PATHS, *["/v1/fork", "/v1/stop"] * 4]))  # these do something
    body = draw(filled(path)) if path in FIELDS else b""
    method = "POST" if path in FIELDS else "GET"
    target = path.encode()
    if draw(st.integers(0, 5)) == 0:
        method = draw(st.sampled_from(METHODS))
    if draw(st.integers(0, 5)) == 0:
        target = draw(spoilt(target) | st.binary(max_size=40).map(lambda more: b"/" + more))
    if draw(st.booleans()) and path not in FIELDS:
        target += b"?" + draw(QUERIES)
    if draw(st.integers(0, 5)) == 0:
        body = draw(spoilt(body) | BODIES)
    return method, target, draw(st.lists(st.sampled_from(HEADERS), max_size=2)), defused(target, body)


def defused(target: bytes, body: bytes) -> bytes:
    """Whatever would be taken for the end of the run, its worker's or many processes', is not sent."""
    path = unquote_to_bytes(target)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if b"cancel" in path:
            msgspec.json.decode(body, type=CancelRequest)
            return b"[]"
        return encoded(harmless("/v1/fork" if b"fork" in path else "", msgspec.json.decode(body)))
    return body


class Wire:
    """One connection that is kept for as long as the other side keeps it; takes any bytes, reads whole answers."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._socket: socket.socket | None = None
        self.connections = 0

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, head: bytes, body: bytes, method: str) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer; of a stream the first line."""
        if self._socket is None:
            self._socket = self._connect()
            self.connections += 1
        self._socket.sendall(head + body)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        kind = response.headers.get_content_type()
        streams = kind == "application/x-ndjson"
        text = response.readline() if streams else response.read()
        if streams or response.will_close or method == "CONNECT":  # after which a body is none
            self.close()
        return response.status, kind, text


DOORS = [pytest.param("head", 0.45, id="head"), pytest.param("agent", 0.1, id="agent")]


@pytest.mark.parametrize(("door", "part"), DOORS)
def test_any_request_is_answered(fuzzed: Fuzzed, door: str, part: float) -> None:
    wire = Wire(getattr(fuzzed, door))

    @share(part)
    @given(asked())
    def ask(request: tuple[str, bytes, list[bytes], bytes]) -> None:
        method, target, headers, body = request
        head = [line_of(method, target) + b" HTTP/1.1", b"Host: head", *headers, b"Content-Length: %d" % len(body)]
        status, kind, text = wire.ask(b"\r\n".join(head) + b"\r\n\r\n", body, method)
        fuzzed.seen[f"{door}: {target.decode() if target.decode(errors='replace') in PATHS else 'any'}", status] += 1
        assert status < 500, (status, text)
        if status >= 400 and kind == "application/json" and method != "HEAD":
            error = msgspec.json.decode(text, type=ErrorReply)
            assert error.error.isprintable(), error
            assert error.error
        elif kind == "application/json" and method != "HEAD":
            json.loads(text)

    ask()
    wire.close()


@pytest.mark.parametrize("door", ["head", "agent"])
def test_what_is_no_request_is_answered_or_hung_up_on(fuzzed: Fuzzed, door: str) -> None:
    """Lines that are none, bodies that are not as long as they say, chunks that are none."""
    begin = st.sampled_from(
        [
            b"",
            b"POST /v1/fork HTTP/1.1\r\nHost: h\r\n",
            b"POST /v1/fork HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"POST /v1/fork HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\nContent-Length: 20\r\n\r\n",
            b"POST /v1/fork HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
            b"GET /v1/health HTTP/9.9\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET //[ HTTP/1.1\r\nHost: h\r\n\r\n",
        ]
    )

    @share(0.025)
    @given(begin, st.binary(max_size=60) | st.sampled_from([b"5\r\nhello\r\n0\r\n\r\n", b"f" * 20, b"-1\r\n"]))
    def send(first: bytes, rest: bytes) -> None:
        status = 0
        with getattr(fuzzed, door)() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(first + rest + b"\r\n\r\n" + b"x" * 9000)  # so that there is nothing left to wait for
            response = http.client.HTTPResponse(connection)
            response.begin()
            status = response.status
        fuzzed.seen[f"{door}: none", status] += 1
        assert status < 500

    send()
