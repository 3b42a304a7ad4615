"""The journal: what is written is read back, whatever happened to the end of it or was put in its place."""

from __future__ import annotations

import multiprocessing
import os
import resource
import stat
from pathlib import Path

import pytest

from slurmfork import journal, process
from slurmfork.journal import Ended, Intent, Journal, Note, Record, Seen, Started

HERE = process.boot_id()


def started(start_id: str, pid: int, *, boot_id: str = HERE) -> Started:
    return Started(
        start_id=start_id,
        worker="a/0",
        pid=pid,
        start_time=1000 + pid,
        boot_id=boot_id,
        uid=1,
        argv=["x", "é\n"],
    )


def story() -> list[Record]:
    return [
        Note(text="begun"),
        Intent(start_id="s1", worker="a/0", argv=["x", "é\n"]),
        started("s1", 10),
        Seen(worker="a/0", processes=[(11, 1), (12, 2)]),
        Ended(start_id="s1", worker="a/0", pid=10, exit_status=0),
    ]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "n1.jsonl"


def write(path: Path, *records: Record) -> None:
    book = Journal(path)
    book.append(*records)
    book.close()


def test_what_is_written_is_read(path: Path) -> None:
    records = story()
    write(path, *records[:2])
    write(path, *records[2:])
    assert list(journal.read(path)) == records
    assert journal.read(path).damaged == 0
    assert path.read_bytes().count(b"\n") == len(records)


def test_only_the_user_may_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        write(path, Note(text="x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_cut_anywhere_it_holds_all_that_was_before(path: Path) -> None:
    records = story()
    write(path, *records)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        found = journal.read(path)
        complete = whole[:size].count(b"\n")
        assert list(found[:complete]) == records[:complete]
        assert len(found) + found.damaged in (complete, complete + 1)
        assert list(found) == records[: len(found)]


def test_a_torn_line_spoils_none_that_follows(path: Path) -> None:
    write(path, Note(text="whole"))
    with path.open("ab") as file:
        file.write(b'{"op":"note","te')
    write(path, Note(text="after"))
    found = journal.read(path)
    assert [record.text for record in found if isinstance(record, Note)] == ["whole", "after"]
    assert found.damaged == 1


DAMAGED = [
    b"\n",
    b"{}\n",
    b"not json\n",
    b"\xff\xfe\0\n",
    b'{"op":"of the future","x":1}\n',
    b'{"op":"ended","start_id":"s","worker":"w","pid":-1}\n',
    b'{"op":"ended","start_id":"s","worker":"w","pid":99999999999999999999}\n',
    b'{"op":"note","text":"' + b"x" * (journal.MAX_LINE + 10) + b'"}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("damage", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_line_is_skipped_and_counted(path: Path, damage: bytes) -> None:
    write(path, Note(text="before"))
    with path.open("ab") as file:
        file.write(damage)
    write(path, Note(text="after"))
    found = journal.read(path)
    assert [record.text for record in found if isinstance(record, Note)] == ["before", "after"]
    assert found.damaged == (0 if damage == b"\n" else 1)


def _fill(path: Path) -> None:
    """In a process of its own, for the limit on the size of files stays: the disk is full, then no longer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
    book = Journal(path)
    book.append(Note(text="fits"))
    try:
        book.append(Note(text="x" * 1000))
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        book.append(Note(text="after"))
        os._exit(7)


def test_a_full_disk_is_an_error_and_costs_one_record(path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_fill, args=(path,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    found = journal.read(path)
    assert [record.text for record in found if isinstance(record, Note)] == ["fits", "after"]
    assert found.damaged == 1


def _append_many(path: Path, name: str) -> None:
    book = Journal(path)
    for _ in range(30):
        book.append(*(Note(text=name * 2000) for _ in range(10)))


def test_records_appended_together_stay_together(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    texts = [record.text[0] for record in journal.read(path) if isinstance(record, Note)]
    assert len(texts) == 600
    assert all(len(set(texts[at : at + 10])) == 1 for at in range(0, 600, 10))


# --- what only pretends to be a journal --------------------------------------------------------------------


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", Note(text="x"))
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        journal.read(path)
    with pytest.raises(OSError, match="symbolic links"):
        Journal(path)


def test_a_pipe_hangs_nobody(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(OSError, match="regular"):
        journal.read(path)
    with pytest.raises(OSError, match="regular"):
        Journal(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_not_believed(path: Path) -> None:
    write(path, Note(text="x"))
    os.chown(path, 65534, -1)
    with pytest.raises(OSError, match="another user"):
        journal.read(path)
    with pytest.raises(OSError, match="another user"):
        Journal(path)


def test_a_file_that_others_can_write_is_not_believed(path: Path) -> None:
    write(path, Note(text="x"))
    path.chmod(0o602)
    with pytest.raises(OSError, match="by others"):
        journal.read(path)


def test_no_journal_is_an_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        journal.read(path)


def test_nothing_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    book = Journal(path)
    book.append(Note(text="x"))
    journal.read(path)
    book.close()
    book.close()
    os.unlink(path)
    os.mkfifo(path)
    for attempt in (journal.read, Journal):
        with pytest.raises(OSError, match="regular"):
            attempt(path)
    assert len(os.listdir("/proc/self/fd")) == before


# --- what may still live -----------------------------------------------------------------------------------


def test_what_ended_is_not_living_but_what_it_left_may_be() -> None:
    records: list[Record] = [*story(), started("s2", 20)]
    assert [one.identity.pid for one in journal.living(records)] == [11, 12, 20]
    assert [record.pid for record in journal.unfinished(records)] == [20]


def test_the_end_of_one_start_is_not_the_end_of_another() -> None:
    records: list[Record] = [started("s1", 10), started("s2", 20), Ended(start_id="s1", worker="a/0", pid=10)]
    assert [one.identity.pid for one in journal.living(records)] == [20]


def test_another_boot_left_nothing_here() -> None:
    there = started("s1", 10, boot_id="another")
    seen = Seen(worker="a/0", processes=[(11, 1)], boot_id="another")
    assert journal.living([there, seen]) == []
    assert journal.unfinished([there, seen]) == [there]


def test_each_process_is_named_once() -> None:
    one = started("s1", 10)
    records: list[Record] = [
        one,
        Seen(worker="a/0", processes=[(10, 1010), (11, 1), (11, 1)]),
        Seen(worker="b/0", processes=[(11, 1)]),
    ]
    found = journal.living(records)
    assert [(living.identity.pid, living.worker, living.uid) for living in found] == [
        (10, "a/0", 1),
        (11, "a/0", None),
    ]
