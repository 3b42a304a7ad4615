"""Ports and directories on a node: what two agents of one host may not have at the same time."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurmfork.agent.ports import Ports, port_range
from slurmfork.backends.queue import shared_directory
from slurmfork.errors import Refused, RunDirError
from slurmfork.rundir import new_run_id
from slurmfork.scratch import Scratch, node_directory, private_directory, remove
from slurmfork.userdir import user_directory

FEW = range(21_000, 21_012)


def test_the_range_is_out_of_the_kernels_way() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = port_range()
    assert len(found) >= 1000
    assert found[-1] < low or found[0] > high or high - low > 60_000


def test_two_agents_never_hold_the_same_port(tmp_path: Path) -> None:
    one, other = Ports(tmp_path / "ports", FEW), Ports(tmp_path / "ports", FEW)
    taken = one.reserve("a/0", 5) + other.reserve("a/0", 5)
    assert len(set(taken)) == 10
    assert set(taken) <= set(FEW)


def test_too_many_are_refused_and_then_none_is_held(tmp_path: Path) -> None:
    one, other = Ports(tmp_path / "ports", FEW), Ports(tmp_path / "ports", FEW)
    with pytest.raises(Refused, match="no 13 free ports"):
        one.reserve("a/0", 13)
    assert len(other.reserve("b/0", 12)) == 12


def test_what_is_released_is_free_again(tmp_path: Path) -> None:
    one, other = Ports(tmp_path / "ports", FEW), Ports(tmp_path / "ports", FEW)
    one.reserve("a/0", 6)
    kept = one.reserve("a/1", 6)
    one.release("a/0")
    assert not set(other.reserve("b/0", 6)) & set(kept)
    assert one.owned("a/0") == []


def test_a_port_that_somebody_listens_on_is_passed_over(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(Refused):
            Ports(tmp_path / "ports", range(port, port + 1)).reserve("a/0", 1)


def test_a_lock_file_that_was_tidied_away_is_made_anew(tmp_path: Path) -> None:
    one = Ports(tmp_path / "ports", FEW)
    held = one.reserve("a/0", 1)[0]
    (tmp_path / "ports").unlink()
    other = Ports(tmp_path / "ports", FEW)
    taken = one.reserve("a/1", 1)
    assert not {held, *taken} & set(other.reserve("b/0", 10))


def test_long_names_are_hashed_so_that_sockets_stay_within_their_limit() -> None:
    run_id = new_run_id("x" * 40)
    path = node_directory(run_id, "gpu-node-with-a-very-long-name.cluster.example.org")
    assert len(os.fsencode(path / "agent.sock")) < 60
    assert path != node_directory(run_id, "gpu-node-with-a-very-long-name2.cluster.example.org")
    assert node_directory("demo-abcdef", "n1").name == "demo-abcdef-n1"


def test_a_planted_directory_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(RunDirError, match="not a directory of this user"):
            private_directory(tmp_path / name)


NOBODY = 50_000 + os.getpid() % 10_000  # a uid that no user has, and no other run of these tests


def as_nobody(ask: Callable[[], object]) -> str:
    """What this process would say as another user."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.seteuid(NOBODY)
            os.write(writer, str(ask()).encode())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said


@pytest.fixture
def places() -> Iterator[list[Path]]:
    """The names under /tmp that are for that user, all of them free."""
    found = [Path(f"/tmp/slurmfork-{NOBODY}"), *(Path(f"/tmp/slurmfork-{NOBODY}-{number}") for number in range(1, 10))]
    yield found
    for path in found:
        remove(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_nobody_keeps_another_from_a_directory_of_his_own(
    places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    for path in (places[0], places[2]):
        path.mkdir(mode=0o777)
    places[1].symlink_to(tmp_path)
    assert as_nobody(user_directory) == str(places[3])
    assert (places[3].stat().st_uid, places[3].stat().st_mode & 0o777) == (NOBODY, 0o700)
    places[1].unlink()
    assert as_nobody(user_directory) == str(places[3]), "all come to the same one"
    assert as_nobody(shared_directory) == str(places[3])
    long = ("x" * 46, "gpu-node-with-a-very-long-name.cluster.example.org")
    assert len(as_nobody(lambda: node_directory(*long))) <= 48


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_session_s_directory_is_the_last_resort(places: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in places:
        path.mkdir()
    session = Path(f"/tmp/xdg-{NOBODY}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(session))
    assert "set XDG_RUNTIME_DIR" in as_nobody(user_directory)
    session.mkdir(mode=0o700)
    try:
        assert "set XDG_RUNTIME_DIR" in as_nobody(user_directory), "it is another's"
        os.chown(session, NOBODY, NOBODY)
        assert as_nobody(user_directory) == str(session / "slurmfork")
    finally:
        remove(session)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(RunDirError, match="not a directory of this user"):
        private_directory(tmp_path / "theirs")


def test_an_open_directory_of_our_own_is_closed(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert private_directory(tmp_path / "open").stat().st_mode & 0o777 == 0o700


async def test_a_worker_name_is_free_at_once_and_what_it_left_goes() -> None:
    scratch = Scratch(new_run_id("scratch"), "n1")
    try:
        first = private_directory(scratch.worker("a/0"))
        (first / "file").write_text("x")
        left = scratch.set_aside("a/0")
        assert left is not None
        assert list(private_directory(scratch.worker("a/0")).iterdir()) == []
        remove(left)
        assert not left.exists()
        assert scratch.set_aside("a/0") is None
        assert scratch.set_aside("never/0") is None
    finally:
        remove(scratch.path)
    assert not scratch.path.exists()


def test_a_node_of_a_run_has_one_agent_at_a_time() -> None:
    run_id = new_run_id("lock")
    first = Scratch(run_id, "n1")
    try:
        with pytest.raises(RunDirError, match="has an agent already"):
            Scratch(run_id, "n1")
        remove(Scratch(run_id, "n2").path)
    finally:
        remove(first.path)
