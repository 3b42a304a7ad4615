"""Requests for fuzzing: some that may well do, some that are spoilt, some that are none; and what sends them.

None does real harm, however right it is: the run's own role is left alone, few processes are started, all asleep.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes

import msgspec
from hypothesis import strategies as st

from slurmfork import names
from slurmfork.head.api import Api
from slurmfork.messages import CancelRequest

OWN = "rollout"  # the run's own role; whatever is started by a request has another one, and sleeps
FORKED = ["beside", "one", "two"]
PATHS = [route.path for route in Api.routes]


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


# --- requests ----------------------------------------------------------------------------------------------

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
    safe = b"".join(b"%%%02X" % c if c <= 0x20 or c == 0x7F else bytes([c]) for c in path)
    return b"%s %s HTTP/1.1" % (method.encode(), safe)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes, bytes]:
    """Method, path and bytes of a request that is one, whatever it asks."""
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
    body = defused(target, body)
    headers = [b"Host: head", *draw(st.lists(st.sampled_from(HEADERS), max_size=2)), b"Content-Length: %d" % len(body)]
    return method, target, b"\r\n".join([line_of(method, target), *headers, b"", body])


def defused(target: bytes, body: bytes) -> bytes:
    """Whatever would be taken for the end of the run, its worker's or many processes', is not sent."""
    path = unquote_to_bytes(target)
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if b"cancel" in path:
            msgspec.json.decode(body, type=CancelRequest)
            return b"[]"
        return encoded(harmless("/v1/fork" if b"fork" in path else "", msgspec.json.decode(body)))
    return body


NO_REQUESTS = st.tuples(
    st.sampled_from(
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
    ),
    st.binary(max_size=60) | st.sampled_from([b"5\r\nhello\r\n0\r\n\r\n", b"f" * 20, b"-1\r\n"]),
    st.just(b"\r\n\r\n" + b"x" * 9000),  # so that there is nothing left to wait for
).map(b"".join)


# --- what sends them ---------------------------------------------------------------------------------------


class Wire:
    """One connection that is kept for as long as the other side keeps it; takes any bytes, reads whole answers."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect
        self._socket: socket.socket | None = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, request: bytes, method: str) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer; of a stream the first line."""
        if self._socket is None:
            self._socket = self._connect()
        self._socket.sendall(request)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        kind = response.headers.get_content_type()
        streams = kind == "application/x-ndjson"
        text = response.readline() if streams else response.read()
        if streams or response.will_close or method == "CONNECT":  # after which a body is none
            self.close()
        return response.status, kind, text
