"""The Python API against arguments of the wrong kind: each is named, and nothing is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slurmfork
from slurmfork.errors import UsageError
from slurmfork.run import Run
from slurmfork.rundir import RunDir, RunRecord


@pytest.fixture
def run(tmp_path: Path) -> Run:
    rundir = RunDir(tmp_path / "demo-abc234")
    rundir.make()
    record = RunRecord(run_id=rundir.run_id, name="demo", backend="local", submitted=time.time(), cwd="/", user="u")
    rundir.write_record(rundir.record, record)
    return Run(rundir, record)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda run: run.fork("ab", command="sleep 100"), "command is a list of words, not 'sleep 100'"),
        (lambda run: run.fork("ab", command=5), "command is a list of words, not 5"),
        (lambda run: run.fork("ab", env="X=1"), "env maps names to values; it is not 'X=1'"),
        (lambda run: run.fork("ab", command=[Path("x")]), "command|PosixPath"),
        (lambda run: run.fork("eval/0"), "'eval/0' is not a role's name"),
        (lambda run: run.stop("a b"), r"'a b' is neither a role nor a worker \(role/index\)"),
        (lambda run: run.wait(timeout="5"), "timeout is a number of seconds, or None; not '5'"),
        (lambda run: slurmfork.submit(123), "spec is a Spec, or the path of one; not 123"),
        (lambda run: slurmfork.submit("x.yaml", overrides="nodes=2"), "overrides is a list of key=value, not the text"),
    ],
)
def test_what_is_wrong_is_named(run: Run, call: Callable[[Run], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call(run)
