"""Logs as one stream: what is shown of files that grow, shrink, are drawn over, or come late."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from slurmfork import logs
from slurmfork.logs import Lines, Merged, Tail, start_of_last
from slurmfork.rundir import RunDir


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "demo-aaaaaa")
    made.make()
    return made


def shown(merged: Merged, *, final: bool = False) -> list[tuple[str, bytes]]:
    return [(source.label, line) for source, line in merged.new(final=final)]


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("width", [3, 40_000])
def test_the_last_lines_are_found_across_pieces(tmp_path: Path, end: bytes, width: int) -> None:
    path = tmp_path / "log"
    lines = [str(number).encode().rjust(width, b".") for number in range(20)]
    path.write_bytes(b"\n".join(lines) + end)
    for count in (1, 2, 7, 19, 20, 21, 500):
        assert path.read_bytes()[start_of_last(path, count) :] == b"\n".join(lines[-count:]) + end
    assert start_of_last(path, 0) == path.stat().st_size


def test_an_empty_file_has_no_last_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    assert start_of_last(path, 5) == 0


def test_a_tail_reads_what_was_appended_and_starts_anew_where_the_file_shrank(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert list(tail.pieces()) == []  # not there yet
    path.write_bytes(b"one\n")
    assert list(tail.pieces()) == [b"one\n"]
    assert list(tail.pieces(insist=True)) == []
    with path.open("ab") as file:
        file.write(b"two\n")
    assert list(tail.pieces()) == [b"two\n"]
    path.write_bytes(b"x\n")
    assert list(tail.pieces()) == [b"x\n"]


def test_lines_wait_for_their_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = Lines(path)
    path.write_bytes(b"whole\npart")
    assert list(lines.new()) == [b"whole"]
    with path.open("ab") as file:
        file.write(b"ial\nrest")
    assert list(lines.new()) == [b"partial"]
    assert list(lines.new(final=True)) == [b"rest"]
    assert list(lines.new(final=True)) == []


def test_a_line_that_was_drawn_over_shows_what_was_drawn_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"\r 10%\r 20%\r 30%\ncarriage\r\n")
    assert list(Lines(path).new()) == [b" 30%", b"carriage"]
    bar = Lines(path)
    list(bar.new())
    with path.open("ab") as file:
        file.write(b"\r 1%\r 2%")
    assert list(bar.new()) == []
    monkeypatch.setattr(logs, "BAR_INTERVAL", 0.0)
    assert list(bar.new()) == [b" 2%"]  # a bar is looked at now and then, though its line does not end


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "log"
    size = 20 << 20
    with path.open("wb") as file:
        file.truncate(size)
    tracemalloc.start()
    try:
        assert sum(map(len, Lines(path).new(final=True))) == size
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_merged_takes_in_logs_that_come_late(rundir: RunDir) -> None:
    rundir.worker_log("b", 0).write_text("1\n2\n3\n")
    merged = Merged(rundir, last=1)
    assert shown(merged) == [("b/0", b"3")]
    rundir.worker_log("a-1", 10).write_text("x\ny\n")  # from its first line on
    rundir.worker_log("a-1", 9).write_text("z\n")
    (rundir.logs / "stray.txt").write_text("no log\n")
    with rundir.worker_log("b", 0).open("a") as file:
        file.write("4\n")
    assert shown(merged) == [("a-1/9", b"z"), ("a-1/10", b"x"), ("a-1/10", b"y"), ("b/0", b"4")]


def test_merged_of_one_role(rundir: RunDir) -> None:
    rundir.worker_log("a", 0).write_text("a\n")
    rundir.worker_log("a-0", 0).write_text("other\n")
    assert shown(Merged(rundir, "a")) == [("a/0", b"a")]
