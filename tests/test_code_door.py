"""Code through the door: only what is missing goes, a lost connection loses nothing, no half file is seen."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from processes import PATIENCE, wait_until
from running import Shell
from test_door import Visitor, Way, drop

from slurmfork.code import reading
from slurmfork.code.listing import listing
from slurmfork.code.manifest import Entry, Manifest
from slurmfork.code.store import Store
from slurmfork.remote.frames import Ask, Exit, Frame, Kind, Piece, Unpacker, pack
from slurmfork.remote.upload import Upload
from slurmfork.rundir import CodeRecord
from slurmfork.spec import Code

SPEC = """
name: sent
backend: local
code: .
roles:
  a: {command: [sh, -c, "cat sub/b.py; sleep 1000"]}
"""
BIG = 3 << 20


@dataclass
class Bar:
    """What a bar was shown."""

    shown: list[tuple[int, int]] = field(default_factory=list)
    hear: Callable[[], None] = lambda: None

    def show(self, done: int, total: int) -> None:
        self.shown.append((done, total))
        self.hear()


@dataclass
class Sender:
    """Submits with code from a directory, through the door."""

    visitor: Visitor
    local: Shell
    spec: Path
    tree: Path
    bar: Bar = field(default_factory=Bar)
    said: list[str] = field(default_factory=list)
    upload: Upload | None = None

    @property
    def store(self) -> Store:
        return Store(self.local.root)

    def send(self) -> int:
        self.bar.shown.clear()
        self.upload = Upload(listing(Code(path=str(self.tree))), str(self.local.root), self.bar, self.said.append)
        args = ["submit", "--json", "--set", "code.path=.", "spec.yaml"]
        self.visitor.out = self.visitor.err = b""
        visit = self.visitor.visit(*args, once=True, files={"spec.yaml": self.spec.read_bytes()}, paths=[4])
        visit._upload = self.upload
        return visit.run()

    def submit(self) -> Path:
        """Submit; the code in the run directory."""
        assert self.send() == 0, self.visitor.err
        run_id: str = json.loads(self.visitor.out)["run_id"]
        self.local.runs.append(run_id)
        return self.local.root / run_id / "code"

    @property
    def sent(self) -> tuple[int, int]:
        """Contents and bytes that went."""
        assert self.upload is not None
        return self.upload.sent, self.bar.shown[-1][1] if self.bar.shown else 0


@pytest.fixture
def sender(local: Shell, tmp_path: Path) -> Sender:
    home, tree = tmp_path / "home", tmp_path / "tree"
    home.mkdir()
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "b.py").write_text("print('hello')\n")
    (tree / "tool").write_text("#!/bin/sh\n")
    (tree / "tool").chmod(0o755)
    (tree / "link").symlink_to("sub/b.py")
    (tree / "empty").touch()
    (tree / "big.bin").write_bytes(os.urandom(BIG))
    return Sender(Visitor(Way(home, env={"SLURMFORK_ROOT": str(local.root)})), local, local.spec(SPEC), tree)


def whole(store: Store) -> bool:
    """Whether each object is what its name says."""
    objects = [path for path in store.path.glob("*/*") if path.parent.name != "incoming"]
    return all(hashlib.sha256(path.read_bytes()).hexdigest() == path.parent.name + path.name for path in objects)


def none_half(store: Store) -> bool:
    """Whether nothing is left of contents that were not whole; a door that was killed has left some for `prune`."""
    return not list((store.path / "incoming").iterdir())


def test_what_was_sent_is_what_is_there(sender: Sender) -> None:
    code = sender.submit()
    assert subprocess.run(["diff", "-r", "--no-dereference", str(sender.tree), str(code)], check=False).returncode == 0
    assert [stat.S_IMODE((code / name).stat().st_mode) for name in ("tool", "sub/b.py", ".")] == [0o700, 0o600, 0o700]
    assert sender.local.status(code.parent.name)["code"]["source"] == str(sender.tree)
    assert json.loads((code.parent / "run.json").read_text())["cwd"] == str(code)
    assert whole(sender.store)
    assert none_half(sender.store)


def test_only_what_changed_goes(sender: Sender) -> None:
    first = sender.submit()
    assert sender.sent == (4, BIG + 25)
    assert sender.submit() != first
    assert sender.sent == (0, 0)
    (sender.tree / "sub" / "b.py").write_text("print('other')\n")
    (sender.tree / "twin").write_text("print('other')\n")
    code = sender.submit()
    assert sender.sent == (1, 15)
    assert (code / "twin").read_text() == (code / "sub" / "b.py").read_text() == "print('other')\n"
    assert (first / "sub" / "b.py").read_text() == "print('hello')\n"


def test_an_upload_that_is_cut_goes_on_where_it_was(sender: Sender) -> None:
    for number in range(300):
        (sender.tree / f"{number}.txt").write_text(str(number))
    sender.visitor.way.cuts = [300, 500, 1300]  # twice in the answer to what is missing, then while it is sent
    code = sender.submit()
    assert sender.visitor.way.opened == 4
    assert sum(1 for _ in code.iterdir()) == 305
    totals = list(dict.fromkeys(total for _, total in sender.bar.shown))
    assert len(totals) > 1
    assert totals == sorted(totals, reverse=True), "what had arrived was sent again"
    assert whole(sender.store)
    assert len(sender.local.json("status")["runs"]) == 1


def test_a_door_that_dies_in_the_middle_of_a_file_leaves_no_half_of_it(sender: Sender) -> None:
    sender.visitor.way.cuts = [150]  # after the hello, an answer and the first words of thanks
    code = sender.submit()
    assert sender.visitor.way.opened == 2
    assert (code / "big.bin").read_bytes() == (sender.tree / "big.bin").read_bytes()


def test_a_door_that_is_killed_while_it_is_sent_to(sender: Sender) -> None:
    def kill() -> None:
        sender.bar.hear = lambda: None
        drop(sender.visitor)

    (sender.tree / "zzz.bin").write_bytes(os.urandom(12 << 20))
    sender.bar.hear = kill
    code = sender.submit()
    assert sender.visitor.way.opened == 2
    assert sender.visitor.said == ["the door over there closed; trying again"]
    assert (code / "zzz.bin").read_bytes() == (sender.tree / "zzz.bin").read_bytes()


def test_code_and_submit_are_there_once_though_the_answer_was_lost(sender: Sender) -> None:
    sender.visitor.way.cuts = [-1, 300]
    sender.submit()
    assert len(sender.local.json("status")["runs"]) == 1


def test_a_file_that_changes_while_it_is_sent_goes_as_it_was_read(sender: Sender) -> None:
    twin = sender.tree / "twin.bin"
    twin.write_bytes((sender.tree / "big.bin").read_bytes())
    changed = os.urandom(BIG)

    def change() -> None:
        if sender.bar.shown[-1][0]:
            sender.bar.hear = lambda: None
            twin.write_bytes(changed)

    (sender.tree / "aaa").write_text("goes first")
    (sender.tree / "zzz.bin").write_bytes(os.urandom(12 << 20))
    sender.bar.hear = change
    code = sender.submit()
    assert (code / "big.bin").read_bytes() == (sender.tree / "big.bin").read_bytes()
    assert (code / "twin.bin").stat().st_size == BIG
    assert whole(sender.store)


def test_a_file_that_vanishes_is_said(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    found = listing(Code(path=str(sender.tree)))
    (sender.tree / "sub" / "b.py").unlink()
    upload = Upload(found, None, sender.bar, sender.said.append)
    entries = upload._hashed(found.entries)
    assert "sub/b.py" not in [entry.path for entry in entries]
    assert sender.said == ["sub/b.py vanished while it was read, and is left out of the code"]
    with pytest.raises(reading.Vanished):
        next(reading.pieces(sender.tree, "sub/b.py"))


def test_a_store_that_cannot_be_written_is_one_line(sender: Sender) -> None:
    sender.local.root.mkdir(mode=0o700)
    sender.store.path.write_text("in the way")
    assert sender.send() == 1
    assert sender.visitor.err.decode().count("\n") == 1
    assert b"is not a directory that only you can write to" in sender.visitor.err
    assert sender.visitor.way.opened == 1


def test_what_was_pruned_in_between_is_sent_again(sender: Sender) -> None:
    first = sender.submit()
    for path in sender.store.path.glob("*/*"):
        path.unlink()
    second = sender.submit()
    assert sender.sent == (4, BIG + 25)
    assert (first / "big.bin").read_bytes() == (second / "big.bin").read_bytes()


def test_a_damaged_object_is_found_and_mended(sender: Sender) -> None:
    sender.submit()
    place = sender.store.place(hashlib.sha256((sender.tree / "big.bin").read_bytes()).digest())
    place.write_bytes(b"\0" * BIG)
    assert sender.send() == 1
    assert b"was damaged, and is removed; submit again" in sender.visitor.err
    assert len(sender.local.json("status")["runs"]) == 1
    sender.submit()


# --- a client that means harm


class Raw:
    """The door, spoken to by hand."""

    def __init__(self, visitor: Visitor) -> None:
        self.channel = visitor.way.start([visitor.python, "-I", "-m", "slurmfork.remote.door"])
        self._unpacker = Unpacker(greeted=True)
        self._ready: list[Frame] = []
        assert self.next().kind is Kind.HELLO

    def say(self, kind: Kind, message: object) -> None:
        self.channel.send(pack(kind, msgspec.msgpack.encode(message)))

    def next(self) -> Frame:
        while not self._ready:
            out, err = self.channel.receive(PATIENCE)
            assert out, err
            self._ready += self._unpacker.feed(out)
        return self._ready.pop(0)

    def until_exit(self) -> tuple[bytes, int]:
        said = b""
        while (frame := self.next()).kind is not Kind.EXIT:
            said += frame.data
        return said, msgspec.json.decode(frame.data, type=Exit).status


@pytest.mark.parametrize(
    "entries",
    [
        [Entry("../../../escaped", size=1, digest=hashlib.sha256(b"x").digest())],
        [Entry("l", target="/tmp"), Entry("l/escaped", size=1, digest=hashlib.sha256(b"x").digest())],
        [Entry("l", target="../..")],
    ],
    ids=["dots", "through a link", "link"],
)
def test_a_manifest_that_leads_out_is_refused_over_there(sender: Sender, entries: Sequence[Entry]) -> None:
    store = sender.store
    store.put(b"x")
    record = CodeRecord(source="/x", host="x", files=1, size=1)
    digest = store.put(Manifest(record=record, entries=list(entries)).encode())
    args = ["submit", "--json", "spec.yaml"]
    files = {"spec.yaml": sender.spec.read_bytes()}
    assert sender.visitor(*args, once=True, files=files, paths=[2], code=digest.hex()) == 2
    assert not list(sender.local.root.parent.rglob("escaped"))
    assert [path.name for path in sender.local.root.iterdir()] == [store.path.name]


def test_a_piece_that_is_not_what_it_says_is_refused(sender: Sender) -> None:
    raw = Raw(sender.visitor)
    raw.say(Kind.ASK, Ask(root=str(sender.local.root), wanted=[]))
    assert raw.next().kind is Kind.ABSENT
    raw.say(Kind.PIECE, Piece(b"this", b"x" * 32))
    said, status = raw.until_exit()
    assert (status, said) == (2, b"slurmfork: what came is not what was sent\n")
    raw.channel.close()
    assert whole(sender.store)
    assert none_half(sender.store)


@pytest.mark.parametrize("name", ["../../x", "zz", "ab" * 31])
def test_a_name_of_code_is_one(sender: Sender, name: str) -> None:
    files = {"spec.yaml": sender.spec.read_bytes()}
    assert sender.visitor("submit", "--json", "spec.yaml", once=True, files=files, paths=[2], code=name) == 2
    assert b"names no code that was sent" in sender.visitor.err


# --- by the command line


def test_submit_with_a_cluster_sends_the_code(sender: Sender) -> None:
    """`--cluster` of a profile that is this machine itself."""
    spec = sender.tree / "spec.yaml"
    spec.write_text(SPEC)
    config = sender.local.directory / "config.toml"
    config.write_text(f'[clusters.here]\nhost = "localhost"\npython = {json.dumps(sys.executable)}\n')
    sender.local.env["SLURMFORK_CONFIG"] = str(config)
    run_id = sender.local.json("submit", str(spec), "--cluster", "here")["run_id"]
    sender.local.runs.append(run_id)
    code = sender.local.root / run_id / "code"
    assert (code / "big.bin").read_bytes() == (sender.tree / "big.bin").read_bytes()
    sender.local.json("wait", run_id, "--for", "ready")
    log = sender.local.root / run_id / "logs" / "a-0.log"
    wait_until(lambda: log.exists() and log.read_text() == "print('hello')\n", "the worker to read its code")
    done = sender.local.call("submit", str(spec), "--cluster", "here", "--set", "code.limit=1M")
    assert done.returncode == 2
    assert "3.0 MB in 6 files, more than its limit of 1M; most of it is big.bin (3.0 MB)" in done.stderr
    pruned = sender.local.json("prune", "--older-than", "0s", "--yes")
    assert pruned == {"removed": [], "code": {"files": 0, "bytes": 0}}, "a submit may still need it"


def test_two_uploads_at_once(sender: Sender) -> None:
    other = Sender(Visitor(Way(sender.visitor.way.home, env=sender.visitor.way.env)), *_same(sender))
    codes: list[Path] = []
    threads = [threading.Thread(target=lambda one=one: codes.append(one.submit())) for one in (sender, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(codes) == 2
    assert codes[0].joinpath("big.bin").read_bytes() == codes[1].joinpath("big.bin").read_bytes()
    assert whole(sender.store)


def _same(sender: Sender) -> tuple[Shell, Path, Path]:
    return sender.local, sender.spec, sender.tree
