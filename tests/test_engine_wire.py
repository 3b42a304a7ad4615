"""The way between callers and hosts: over TLS as over a Unix socket, lost and found again; who is let in."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slurmfork import credentials
from slurmfork.engine import shared, wire
from slurmfork.engine.caller import Connection
from slurmfork.engine.codec import pack, unpack
from slurmfork.engine.door import Door
from slurmfork.engine.hosted import Engines
from slurmfork.engine.hosting import Hosting
from slurmfork.engine.inbox import Arrived, Inbox
from slurmfork.engine.streams import WINDOW
from slurmfork.engine.tls import TlsChannel
from slurmfork.engine.unix import UnixChannel
from slurmfork.engine.warm import LEAST, Warm
from slurmfork.errors import CodecError, Unreachable, WorkerFailed
from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState
from slurmfork.rundir import RunDir

PATIENCE = 30.0
RUN = "wire-abc234"


class Site:
    """A host without a process of its own, and all that a connection asks of who knows the run."""

    def __init__(self, directory: Path) -> None:
        self.run_id = RUN
        self.rundir = RunDir(directory / RUN)
        self.rundir.make()
        credentials.make(self.rundir.credentials, RUN)
        self.credentials_directory = self.rundir.credentials
        self.view = WorkerView(worker="w/0", role="w", index=0, pid=os.getpid(), state=WorkerState.READY)
        self.engines = Engines("w/0")
        told = Hosting(
            worker="w/0",
            run_id=RUN,
            run_dir=str(self.rundir.path),
            socket=str(directory / "engine.sock"),
            address="127.0.0.1",
            path="engine_classes:Engine",
        )
        self.door = Door(told, self.engines)
        self.unix, self.tls = self.door.open()
        self.port = int(self.tls.rpartition(":")[2])

    def engine_views(self, role: str) -> list[WorkerView]:
        return [self.view]

    async def connect(self, endpoint: str) -> Connection:
        self.view.endpoints = [endpoint]
        made = Connection(self, self.view)
        await made.open()
        return made


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    monkeypatch.setenv("SLURMFORK_WORKER", "w/0")
    monkeypatch.setenv("SLURMFORK_AGENT", "/nowhere")
    monkeypatch.setenv("SLURMFORK_RUN_ID", RUN)
    made = Site(tmp_path)
    await made.engines.create("w/0", "", "engine_classes:Engine", lambda: ([], {}))
    yield made
    await made.engines.close()
    made.door.close()


async def call(connection: Connection, method: str, *args: Any) -> Any:
    future = begin(connection, method, *args)
    return await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE)


def begin(connection: Connection, method: str, *args: Any) -> Any:
    def make(number: int, received: list[int]) -> wire.Message:
        return wire.Call(number, "w/0", "", method, False, 0, received)

    return connection.request("w/0", make, pack([list(args), {}]), ())


# --- both ways ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unix", "tls"])
async def test_calls_and_large_values_go_either_way(site: Site, way: str) -> None:
    connection = await site.connect(getattr(site, way))
    assert await call(connection, "echo", 1) == 1
    array = numpy.arange(3_000_000)
    assert numpy.array_equal(await call(connection, "echo", array), array)
    rows = [numpy.full(size, size) for size in (10, 600, 9_000, 70_000)]
    back = await asyncio.gather(*(call(connection, "echo", row) for row in rows * 25))
    assert all(numpy.array_equal(one, row) for one, row in zip(back, rows * 25, strict=True))
    connection.close()


async def test_a_lost_connection_is_found_again_and_no_call_is_done_twice(site: Site, tmp_path: Path) -> None:
    connection = await site.connect(site.tls)
    waiting = begin(connection, "waits", str(tmp_path / "a"))
    before = begin(connection, "grows", 1)
    assert await asyncio.wait_for(asyncio.wrap_future(before), PATIENCE) == 1
    channel = connection._channel
    assert isinstance(channel, TlsChannel)
    assert channel._transport is not None
    channel._transport.abort()
    during = [begin(connection, "grows", 1) for _ in range(50)]  # sent to nobody, or to who has hung up
    (tmp_path / "a").touch()
    assert await asyncio.wait_for(asyncio.wrap_future(waiting), PATIENCE) == "done"
    results = [await asyncio.wait_for(asyncio.wrap_future(one), PATIENCE) for one in during]
    assert sorted(results) == list(range(2, 52))
    assert await call(connection, "grows", 0) == 51
    connection.close()


async def test_a_stream_whose_connection_is_lost_fails_and_its_generator_is_closed(site: Site, tmp_path: Path) -> None:
    connection = await site.connect(site.tls)
    heard: asyncio.Queue[tuple[Any, Exception | None, bool]] = asyncio.Queue()

    def make(number: int, received: list[int]) -> wire.Message:
        return wire.Call(number, "w/0", "", "counts_forever", False, WINDOW, received)

    arguments = pack([[str(tmp_path / "closed")], {}])
    connection.stream("w/0", make, arguments, (), lambda *entry: heard.put_nowait(entry))
    assert await asyncio.wait_for(heard.get(), PATIENCE) == (0, None, False)
    channel = connection._channel
    assert isinstance(channel, TlsChannel)
    assert channel._transport is not None
    channel._transport.abort()
    error, over = None, False
    while not over:
        _, error, over = await asyncio.wait_for(heard.get(), PATIENCE)
    assert isinstance(error, Unreachable)
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not (tmp_path / "closed").exists():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)
    assert await call(connection, "echo", 1) == 1
    connection.close()


async def test_a_call_that_ends_each_connection_is_not_sent_for_ever(site: Site) -> None:
    connection = await site.connect(site.unix)
    number: Any = 3  # in place of a method's name
    with pytest.raises(Unreachable, match="was lost 5 times in a row"):
        await call(connection, number)
    again = await site.connect(site.unix)
    assert await call(again, "echo", 1) == 1
    again.close()


async def test_an_answer_is_kept_until_it_has_arrived(site: Site) -> None:
    heard: asyncio.Queue[Arrived] = asyncio.Queue()
    reader, writer = await hello(site, "session-1")
    frame = wire.frame(wire.Call(7, "w/0", "", "grows", False, 0, []), pack([[5], {}]))
    inbox = Inbox(heard.put_nowait)
    for _ in range(3):  # asked three times, done once
        writer.write(b"".join(frame.parts))
        assert unpack((await answer(reader, inbox, heard)).body, []) == 5
    writer.close()
    reader, writer = await hello(site, "session-1")  # and once more by another connection
    writer.write(b"".join(frame.parts))
    assert unpack((await answer(reader, inbox, heard)).body, []) == 5
    received = wire.frame(wire.Received([7]))
    other = wire.frame(wire.Call(8, "w/0", "", "grows", False, 0, []), pack([[0], {}]))
    writer.write(b"".join(received.parts + frame.parts + other.parts))  # a copy that comes late is not done either
    last = await answer(reader, inbox, heard)
    assert (last.message.id, unpack(last.body, [])) == (8, 5)
    writer.close()


async def hello(site: Site, session: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = credentials.client_context(site.rundir.credentials)
    name = credentials.engine_name(RUN)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context, server_hostname=name)
    writer.write(b"".join(wire.frame(wire.Hello(RUN, session)).parts))
    heard: asyncio.Queue[Arrived] = asyncio.Queue()
    welcome = await answer(reader, Inbox(heard.put_nowait), heard)
    assert isinstance(welcome.message, wire.Welcome)
    return reader, writer


async def answer(reader: asyncio.StreamReader, inbox: Inbox, heard: asyncio.Queue[Arrived]) -> Arrived:
    while heard.empty():
        room = inbox.room()
        data = await asyncio.wait_for(reader.read(len(room)), PATIENCE)
        assert data, "the host has hung up"
        room[: len(data)] = data
        inbox.filled(len(data))
    return heard.get_nowait()


async def test_calls_to_a_worker_that_is_gone_fail_with_the_heads_word(site: Site, tmp_path: Path) -> None:
    connection = await site.connect(site.unix)
    waiting = begin(connection, "waits", str(tmp_path / "a"))
    site.view = WorkerView(worker="w/0", role="w", index=0, state=WorkerState.FAILED, exit_status=9, log_tail="tail")
    site.door.close()
    with pytest.raises(WorkerFailed, match="exit status 9") as caught:
        await asyncio.wait_for(asyncio.wrap_future(waiting), PATIENCE)
    assert caught.value.log_tail == "tail"


# --- who is let in -----------------------------------------------------------------------------------------


async def hung_up(reader: asyncio.StreamReader) -> bool:
    with contextlib.suppress(OSError):  # ssl's errors among them
        return await asyncio.wait_for(reader.read(1), PATIENCE) == b""
    return True


async def test_nobody_comes_in_by_tcp_without_a_certificate(site: Site) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.load_verify_locations(site.rundir.credentials / credentials.AUTHORITY)
    name = credentials.engine_name(RUN)
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=bare, server_hostname=name)
        writer.write(b"".join(wire.frame(wire.Hello(RUN, "x")).parts))
        assert await hung_up(reader)
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(b"".join(wire.frame(wire.Hello(RUN, "x")).parts))
    writer.write_eof()
    assert await hung_up(reader)


@pytest.mark.parametrize("who", ["of another run", "an agent"])
async def test_a_certificate_opens_its_own_door_only(site: Site, tmp_path: Path, who: str) -> None:
    directory = site.rundir.credentials
    context = credentials.agent_context(directory)
    if who == "of another run":
        credentials.make(tmp_path / "other", "other-abc234")
        context = credentials.client_context(tmp_path / "other")
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    name = credentials.engine_name(RUN)
    with contextlib.suppress(OSError):
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=context, server_hostname=name)
        writer.write(b"".join(wire.frame(wire.Hello(RUN, "x")).parts))
        assert await hung_up(reader)


async def test_a_caller_knows_whom_it_talks_to(site: Site) -> None:
    """A server with another certificate of the run's, as a worker's process could read it, is no engine's host."""
    context = credentials.server_context(site.rundir.credentials)
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(Unreachable, match="cannot be reached"):
        await site.connect(f"tls://127.0.0.1:{port}")
    server.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_another_user_is_turned_away_even_if_the_socket_were_open(site: Site) -> None:
    path = Path(site.unix.removeprefix("unix:"))
    opened_up = (path, path.parent)
    before = [place.stat().st_mode for place in opened_up]
    hello = b"".join(wire.frame(wire.Hello(RUN, "x")).parts)
    code = (
        f"import os, socket; s = socket.socket(socket.AF_UNIX); os.chdir({str(path.parent)!r});"
        "os.setgid(65534); os.setuid(65534);"  # already inside: what is above is closed to it, as it should be
        f"s.settimeout(30); s.connect({path.name!r}); s.sendall({hello!r}); print(s.recv(100))"
    )
    for place in opened_up:
        place.chmod(0o777)
    try:
        child = await asyncio.create_subprocess_exec(sys.executable, "-I", "-c", code, stdout=-1, stderr=-1)
        output, errors = await asyncio.wait_for(child.communicate(), PATIENCE)
    finally:
        for place, mode in zip(opened_up, before, strict=True):
            place.chmod(mode)
    assert output == b"b''\n" or b"ConnectionResetError" in errors or b"BrokenPipeError" in errors, errors


def test_the_socket_is_the_users_alone(tmp_path: Path) -> None:
    async def opened() -> int:
        site = Site(tmp_path)
        mode = os.stat(site.unix.removeprefix("unix:")).st_mode
        site.door.close()
        return mode

    umask = os.umask(0)
    try:
        assert asyncio.run(opened()) & 0o777 == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(umask)


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 64,
        b"".join(wire.frame(wire.Ask(1)).parts),
        b"".join(wire.frame(wire.Hello("another-run", "x")).parts),
        b"".join(wire.frame(wire.Hello(RUN, "x")).parts) + b"".join(wire.frame(wire.Welcome("x", 1)).parts),
    ],
)
async def test_who_says_nonsense_is_shown_out_and_nobody_else(site: Site, data: bytes) -> None:
    good = await site.connect(site.unix)
    reader, writer = await asyncio.open_unix_connection(site.unix.removeprefix("unix:"))
    writer.write(data)
    if data.startswith(b"\xff"):
        writer.write_eof()
    while await asyncio.wait_for(reader.read(1000), PATIENCE):
        pass
    assert await call(good, "echo", 1) == 1
    writer.close()
    good.close()


# --- frames ------------------------------------------------------------------------------------------------

MESSAGES = st.builds(wire.Call, *[st.integers(0, 2**40)], st.text(), st.text(), st.text(), st.booleans(),
                     st.integers(0, 99), st.lists(st.integers(0, 2**40)))  # fmt: skip
BUFFERS = st.lists(st.binary(max_size=3000) | st.just(bytes(300_000)), max_size=4)


@given(st.lists(st.tuples(MESSAGES, BUFFERS), max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_frames_arrive_however_they_are_cut(said: list[Any], data: st.DataObject) -> None:
    text = b""
    for message, buffers in said:
        packed = pack("x")._replace(buffers=[memoryview(one) for one in buffers])
        text += b"".join(wire.frame(message, packed).parts)
    heard: list[Arrived] = []
    inbox = Inbox(heard.append)
    while text:
        room = inbox.room()
        count = min(len(room), len(text), data.draw(st.integers(1, 400_000)))
        room[:count] = text[:count]
        inbox.filled(count)
        text = text[count:]
    assert [one.message for one in heard] == [message for message, _ in said]
    assert [[bytes(one) for one in arrived.buffers] for arrived in heard] == [buffers for _, buffers in said]


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_an_inbox_refuses_in_one_way(data: bytes) -> None:
    inbox = Inbox(lambda arrived: None)
    with contextlib.suppress(CodecError):
        while data:
            room = inbox.room()
            count = min(len(room), len(data))
            room[:count] = data[:count]
            inbox.filled(count)
            data = data[count:]


async def test_blocks_of_shared_memory_are_lent_again_and_given_back() -> None:
    heard: asyncio.Queue[Arrived] = asyncio.Queue()
    left, right = socket.socketpair()
    sender = UnixChannel(left, lambda arrived: None, lambda why: None)
    receiver = UnixChannel(right, heard.put_nowait, lambda why: None)
    assert sender.lender is not None
    for number in range(30):
        value = pack(numpy.full(100_000, number))
        sender.send(wire.frame(wire.Result(number, False), value, sender.lender))
        arrived = await asyncio.wait_for(heard.get(), PATIENCE)
        array = unpack(arrived.body, arrived.buffers)
        assert (array == number).all()
        del arrived, array
        while sender.lender.empty or not sender.lender._free:
            await asyncio.sleep(0)
    assert len(sender.lender._blocks) == 1
    sender.lender._clock = lambda: 1e12
    sender._trim()
    assert sender.lender.empty
    while receiver._borrower._maps:
        await asyncio.sleep(0.001)
    sender.close()
    receiver.close()


def test_memory_that_could_shrink_is_refused() -> None:
    descriptor = os.memfd_create("x")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(CodecError, match="could shrink"):
        shared.Borrower(lambda block: None).take(1, 4096, descriptor)
    with pytest.raises(CodecError, match="no such"):
        shared.Borrower(lambda block: None).take(1, 4096, None)


def test_a_message_is_small() -> None:
    """An empty call and its answer are a few dozen bytes each: what is not said need not be read."""
    asked = wire.frame(wire.Call(1, "rollout/0", "", "step", False, 0, [0]), pack([[], {}]))
    assert asked.size < 64
    assert wire.frame(wire.Result(1, False), pack(None)).size < 32
    assert msgspec.msgpack.decode(pack(None).body) is None


# --- warm memory -------------------------------------------------------------------------------------------


async def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    warm = Warm(asyncio.get_running_loop())
    data = memoryview(b"\x07" * (2 * LEAST + 5))
    first = warm.copy(data)
    assert isinstance(first, memoryview)
    first[-1] = 9  # writable, and nobody else's
    kept = numpy.frombuffer(first, numpy.uint8)[-3:]
    where = numpy.frombuffer(first, numpy.uint8).ctypes.data
    del first
    second = warm.copy(data)  # the end of the first is still looked at
    assert numpy.frombuffer(second, numpy.uint8).ctypes.data != where
    assert (second == data, kept.tolist()) == (True, [7, 7, 9])
    del kept
    third = warm.copy(data)
    assert numpy.frombuffer(third, numpy.uint8).ctypes.data == where
    assert third == data


async def test_what_is_small_is_a_plain_copy() -> None:
    assert isinstance(Warm(asyncio.get_running_loop()).copy(memoryview(bytes(LEAST - 1))), bytes)
