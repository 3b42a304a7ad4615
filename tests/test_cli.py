"""The command line without a living run: parsing, errors, specs, and run directories whose run is over."""

from __future__ import annotations

import configparser
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from slurmfork import process
from slurmfork.backends.local import LocalJob
from slurmfork.cli import main as door
from slurmfork.cli import output
from slurmfork.cli.group import cli
from slurmfork.cli.main import GROUPS, SECTIONS, VERBS, main
from slurmfork.cli.options import Seconds
from slurmfork.doctor import machine
from slurmfork.errors import BackendError, PlanError, Problem, Refused, SpecError, UsageError
from slurmfork.messages import NodeView, StatusView, WorkerCounts, WorkerView
from slurmfork.names import RunState, WorkerState
from slurmfork.rundir import EndRecord, RunDir, RunRecord, find

REPOSITORY = Path(__file__).resolve().parent.parent
PRINTS_DATA = {
    "validate", "plan", "submit", "wait", "status", "ps", "fork", "stop", "cancel", "clean", "prune", "doctor",
    "cluster bootstrap",
    "cluster list", "cluster test",
}  # fmt: skip
GOOD = "name: good\nbackend: local\nroles:\n  a: {replicas: 3, command: [sleep, '9']}\n"
BAD = "name: bad\nbackend: local\nrolls: {}\nroles:\n  a: {replica: 2, command: [sleep, '9']}\n"
TOO_BIG = "name: big\nbackend: local\nnodes: 1\nlocal: {gpus-per-node: 1}\nroles:\n  a: {gpus: 2, command: [x]}\n"


class Said:
    """What a command said, and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "runs"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("SLURMFORK_ROOT", str(path))
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def say(root: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Said:
        capsys.readouterr()
        status = main(arguments)
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return run


def environment(root: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "SLURMFORK_ROOT": str(root), "COLUMNS": "200", **more}


def make_run(
    root: Path,
    run_id: str,
    *,
    age: float = 60.0,
    end: EndRecord | None = None,
    workers: Sequence[WorkerView] = (),
    job_id: str | None = None,
) -> RunDir:
    """A run directory as a run leaves it; without ``end`` one of which nothing was heard."""
    rundir = RunDir(root / run_id)
    rundir.make()
    submitted = time.time() - age
    record = RunRecord(
        run_id=run_id,
        name="demo",
        backend="local",
        submitted=submitted,
        cwd="/",
        user="u",
        job_id=job_id,
        nodes=1,
    )
    rundir.write_record(rundir.record, record)
    rundir.write(rundir.spec, b'{"name": "demo", "backend": "local", "roles": {"a": {"command": ["x"]}}}')
    for view in workers:
        rundir.worker_log(view.role, view.index).write_text(f"first of {view.worker}\nlast of {view.worker}\n")
    if end is not None:
        node = NodeView(node="local0", joined=True, cpus=2, devices=["0", "1"])
        failed = sum(view.state is WorkerState.FAILED for view in workers)
        saved = StatusView(
            run_id=run_id,
            state=end.state,
            nodes=[node],
            workers=list(workers),
            counts=WorkerCounts(total=len(workers), failed=failed),
        )
        rundir.write_record(rundir.status, saved)
        rundir.write_record(rundir.end, end)
    return rundir


def ended(state: RunState, *, ago: float = 30.0, status: int | None = None, reason: str = "so it was") -> EndRecord:
    return EndRecord(state=state, reason=reason, exit_status=status, survivors=0, ended=time.time() - ago)


def worker(name: str, state: WorkerState = WorkerState.EXITED, **more: Any) -> WorkerView:
    role, _, index = name.partition("/")
    return WorkerView(worker=name, role=role, index=int(index), node="local0", state=state, **more)


# --- the door


def test_help_shows_every_verb_and_imports_nothing_that_costs_time(root: Path) -> None:
    code = (
        "import sys; from slurmfork.cli.main import main; status = main(['--help']);"
        "slow = {'click', 'rich', 'yaml', 'jinja2', 'msgspec', 'ssl'} & set(sys.modules);"
        "sys.exit(status or (f'imported: {slow}' if slow else 0))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)
    assert shown == [name for section in SECTIONS.values() for name in section]


def test_no_arguments_and_the_group_s_own_help_are_the_same_page(say: Any) -> None:
    page = say("--help").out
    assert say().out == page
    assert cli.get_help(click.Context(cli)).strip() == page.strip()
    assert say("--version").out.startswith("slurmfork ")


COMMANDS = [*(verb for verb in VERBS if verb not in GROUPS), *(f"{g} {verb}" for g in GROUPS for verb in GROUPS[g])]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help_and_the_common_options(say: Any, verb: str) -> None:
    said = say(*verb.split(), "--help")
    assert said.status == 0
    assert f"Usage: slurmfork {verb}" in said.out
    assert "Examples:" in said.out
    assert "--root" in said.out
    assert "--debug" in said.out
    assert ("--json" in said.out) == (verb in PRINTS_DATA)
    assert all(len(line) <= 100 for line in said.out.splitlines())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sttus"], "did you mean 'status'? `slurmfork --help`"),
        (["frobnicate"], "there is no verb 'frobnicate'; `slurmfork --help`"),
        (["fork"], "missing argument 'RUN'; `slurmfork fork --help`"),
        (["status", "--jsn"], "--jsn"),
        (["--nonsense"], "--nonsense"),
        (["wait", "x", "--for", "ever"], "'ever' is not one of"),
        (["wait", "x", "--timeout", "soon"], "'soon' is not a duration"),
        (["prune", "--older-than", "30"], "'30' is not a duration; write 7d"),
        (["fork", "x", "y", "--env", "novalue"], "'novalue' is not NAME=VALUE"),
        (["cancel", ""], "the name of the run is empty"),
        (["status", " "], "the name of the run is empty"),
        (["clean"], "say which run to clean, or --all"),
        (["clean", "x", "--all"], "say which run to clean, or --all"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(say: Any, arguments: list[str], words: str) -> None:
    said = say(*arguments)
    assert said.status == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("slurmfork: ")
    assert words in said.err


def test_with_json_an_error_is_one_document(say: Any) -> None:
    said = say("status", "nothing", "--json")
    assert said.status == 1
    assert said.document["kind"] == "not_found"
    assert said.document["error"] in said.err
    assert say("wait", "--json").document["kind"] == "usage"
    assert say("fork", "nothing", "role", "--", "cmd", "--json").out == ""  # that --json is the command's


@pytest.mark.parametrize(
    ("error", "status", "words", "kind"),
    [
        (PlanError("does not fit"), 2, ["does not fit"], "plan"),
        (
            SpecError([Problem("a", file="f", line=3, path="x.y"), Problem("b")]),
            2,
            ["f:3: x.y: a", "b"],
            "spec",
        ),
        (BackendError("no"), 1, ["no"], "backend"),
        (Refused("held", "in_use"), 1, ["held"], "in_use"),
        (KeyboardInterrupt(), 130, ["interrupted"], "interrupted"),
        (ValueError("two\nlines"), 1, ["fault: ValueError: two lines; --debug shows where"], "fault"),
    ],
)
def test_the_edge(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, words: list[str], kind: str
) -> None:
    output.reset()
    assert door._explain(error, ["--json"]) == status
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"slurmfork: {line}" for line in words]
    assert json.loads(captured.out)["kind"] == kind


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="deep") as caught:
        raise ValueError("deep inside")
    assert door._explain(caught.value, ["--debug"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert "test_debug_shows_where" in captured.err


def test_a_second_document_is_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    output.reset()
    output.document({"survivors": 1})
    output.error_document(ValueError("x"), "x", "fault")
    assert json.loads(capsys.readouterr().out) == {"survivors": 1}


def test_a_reader_that_leaves_is_no_error(root: Path) -> None:
    run = make_run(root, "demo-aaaaaa", end=ended(RunState.COMPLETED))
    with run.worker_log("a", 0).open("w") as log:
        log.writelines(f"line {number}\n" for number in range(200_000))
    process = subprocess.Popen(
        [sys.executable, "-m", "slurmfork", "logs", "last"],
        env=environment(root),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"a/0 | line 0\n"
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(60) == 1


def test_completion_knows_verbs_and_runs(root: Path) -> None:
    make_run(root, "demo-aaaaaa")

    def complete(words: str) -> list[str]:
        env = environment(
            root,
            _SLURMFORK_COMPLETE="bash_complete",
            COMP_WORDS=words,
            COMP_CWORD=str(len(words.split()) - 1),
        )
        argv = [sys.executable, "-m", "slurmfork"]
        done = subprocess.run(argv, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("slurmfork st") == ["stop", "status"]
    assert complete("slurmfork ps de") == ["demo-aaaaaa"]
    assert "--role" in complete("slurmfork ps --r")


# --- specs


def test_validate(say: Any, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    said = say("validate", "good.yaml")
    assert (said.status, said.out) == (0, "ok: 1 role, 3 workers on 1 node\n")
    assert say("validate", "good.yaml", "--json").document == {"ok": True, "errors": []}
    assert "1 worker " in say("validate", "good.yaml", "--set", "roles.a.replicas=1").out


def test_validate_names_every_mistake(say: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(BAD)
    said = say("validate", "bad.yaml")
    assert (said.status, said.out) == (2, "")
    lines = said.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("slurmfork: bad.yaml:3: ")
    assert "replicas" in lines[1]  # the nearest name
    said = say("validate", "bad.yaml", "--json")
    assert said.status == 2
    assert said.document["ok"] is False
    assert [error["line"] for error in said.document["errors"]] == [3, 5]
    assert set(said.document["errors"][0]) >= {"line", "path", "message"}


def test_what_does_not_fit_is_invalid(say: Any, tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text(TOO_BIG)
    said = say("validate", "big.yaml", "--json")
    assert said.status == 2
    assert said.document["ok"] is False
    assert len(said.document["errors"]) == 1
    assert say("plan", "big.yaml").status == 2
    assert say("plan", "big.yaml", "--gpus-per-node", "2").status == 0


def test_plan(say: Any, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    said = say("plan", "good.yaml", "--nodes", "2", "--gpus-per-node", "4", "--set", "roles.a.gpus=2", "--json")
    assert [(w["worker"], w["node"], w["gpus"], w["rank"]) for w in said.document["workers"]] == [
        ("a/0", "node0", [0, 1], 0),
        ("a/1", "node0", [2, 3], 1),
        ("a/2", "node1", [0, 1], 2),
    ]
    assert said.document["request"]["nodes"] == 2
    lines = say("plan", "good.yaml").out.splitlines()
    assert lines[0].split() == ["WORKER", "NODE", "GPUS", "CPUS", "RANK", "BESIDE"]
    assert len(lines) == 4


@pytest.mark.parametrize("backend", ["local", "slurm"])
def test_render_prints_a_script_that_bash_can_read(say: Any, tmp_path: Path, backend: str) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    said = say("render", "good.yaml", "--backend", backend)
    assert said.status == 0, said.err
    assert said.out.startswith("#!")
    assert "good-xxxxxx" in said.out
    subprocess.run(["bash", "-n"], input=said.out, text=True, check=True, timeout=60)


def test_init(say: Any, tmp_path: Path) -> None:
    assert say("init").status == 0
    assert say("validate", "slurmfork.yaml", "-b", "local").status == 0
    assert say("validate", "slurmfork.yaml", "-b", "slurm").status == 0
    (tmp_path / "slurmfork.yaml").write_text("mine")
    said = say("init")
    assert said.status == 2
    assert "--force" in said.err
    assert (tmp_path / "slurmfork.yaml").read_text() == "mine"
    assert say("init", "--force").status == 0
    assert (tmp_path / "slurmfork.yaml").read_text() != "mine"
    assert say("init", "my-run.yaml").status == 0
    assert "name: my-run " in (tmp_path / "my-run.yaml").read_text()
    assert say("init", "no/where.yaml").status == 1


# --- looking at runs that are over


def test_status_of_nothing(say: Any) -> None:
    assert say("status", "--json").document == {"runs": []}
    said = say("status")
    assert (said.status, said.out) == (0, "")
    assert "slurmfork init" in said.err


def test_status_of_all_and_of_one(say: Any, root: Path) -> None:
    failed = worker("a/0", WorkerState.FAILED, reason="exited with 7", exit_status=7, log_tail="why\nit failed")
    make_run(root, "demo-bbbbbb", age=50, end=ended(RunState.FAILED, status=7), workers=[failed, worker("a/1")])
    make_run(root, "demo-aaaaaa", age=5000, end=ended(RunState.COMPLETED, status=0), job_id="4711")
    runs = say("status", "--json").document["runs"]
    assert [run["run_id"] for run in runs] == ["demo-aaaaaa", "demo-bbbbbb"]  # the newest last
    assert {
        "run_id",
        "name",
        "backend",
        "job_id",
        "state",
        "reason",
        "nodes",
        "workers",
        "exit_status",
    } <= set(runs[1])
    assert runs[1]["workers"] == {"ready": 0, "running": 0, "failed": 1, "total": 2}
    assert [(run["state"], run["exit_status"]) for run in runs] == [("completed", 0), ("failed", 7)]
    lines = say("status").out.splitlines()
    assert lines[0].split()[:5] == ["RUN", "NAME", "BACKEND", "JOB", "STATE"]
    assert [line.index("local") for line in lines[1:]] == [lines[0].index("BACKEND")] * 2
    one = say("status", "demo-b").out
    assert "a/0 on local0: failed, exited with 7\n  | why\n  | it failed\n" in one
    assert "rings" in one
    assert say("status", "4711", "--json").document["runs"][0]["run_id"] == "demo-aaaaaa"
    assert say("status", "last", "--json").document["runs"][0]["run_id"] == "demo-bbbbbb"
    assert "could be any of 2 runs" in say("status", "demo").err


def test_no_name_is_no_run_s(root: Path) -> None:
    make_run(root, "demo-aaaaaa")
    with pytest.raises(UsageError, match="is empty"):
        find(root, "")


def test_a_damaged_run_does_not_hide_the_others(say: Any, root: Path) -> None:
    make_run(root, "demo-aaaaaa", end=ended(RunState.COMPLETED))
    make_run(root, "demo-bbbbbb").record.write_text("{")
    assert [run["run_id"] for run in say("status", "--json").document["runs"]] == ["demo-aaaaaa"]
    assert say("status", "demo-a").status == 0
    said = say("status", "demo-bbbbbb")
    assert said.status == 1
    assert "damaged" in said.err


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("end.json", '{"x', "end.json is damaged"),
        ("head.json", "[]", "head.json is damaged"),
        ("run.json", '"backend": "cloud"', "unknown backend 'cloud'"),
    ],
)
def test_one_bad_run_is_unknown_and_keeps_nothing_from_the_others(
    say: Any, root: Path, file: str, text: str, words: str
) -> None:
    make_run(root, "demo-aaaaaa", age=9000, end=ended(RunState.COMPLETED, ago=8000))
    bad = make_run(root, "demo-bbbbbb", age=9000, job_id="17")
    record = bad.record.read_text()
    (bad.path / file).write_text(record.replace('"backend": "local"', text) if file == "run.json" else text)
    runs = say("status", "--json").document["runs"]
    assert [run["state"] for run in runs] == ["completed", "unknown"]
    assert words in runs[1]["reason"]
    assert say("status").status == say("status", "demo-b").status == 0
    assert [run["run_id"] for run in say("clean", "--all", "--json").document["runs"]] == ["demo-aaaaaa"]
    said = say("wait", "demo-b")
    assert said.status == 1
    assert words in said.err
    assert say("prune", "--older-than", "1h", "--yes", "--json").document["removed"] == ["demo-aaaaaa"]


def test_a_directory_that_is_not_believed_does_not_keep_the_others_from_being_cleaned(say: Any, root: Path) -> None:
    for run_id in ("demo-aaaaaa", "demo-bbbbbb", "demo-cccccc"):
        make_run(root, run_id, age=9000, end=ended(RunState.COMPLETED, ago=8000))
    (root / "demo-bbbbbb").chmod(0o777)
    said = say("clean", "--all", "--json")
    assert (said.status, [run["run_id"] for run in said.document["runs"]]) == (0, ["demo-aaaaaa", "demo-cccccc"])
    said = say("clean", "demo-bbbbbb")
    assert (said.status, "demo-bbbbbb" in said.err) == (1, True)
    said = say("prune", "--older-than", "1h", "--yes", "--json")
    assert (said.status, said.document["removed"]) == (0, ["demo-aaaaaa", "demo-cccccc"])


def test_two_runs_of_one_job_id_are_told_apart(say: Any, root: Path) -> None:
    """Job ids are given out again."""
    now = process.identify(os.getpid())
    assert now
    for run_id, start_time, age in (("demo-aaaaaa", now.start_time - 1, 260_000), ("demo-bbbbbb", now.start_time, 3)):
        run = make_run(root, run_id, age=age, job_id="17")
        run.write_record(
            run.path / "local.json", LocalJob(host=os.uname().nodename, **{**now._asdict(), "start_time": start_time})
        )
    runs = say("status", "--json").document["runs"]
    assert [run["state"] for run in runs] == ["failed", "starting"]


def test_a_cancel_mends_an_end_that_cannot_be_read(say: Any, root: Path) -> None:
    run = make_run(root, "demo-aaaaaa")
    run.end.write_text("{")
    assert say("cancel", "demo-a").out == "demo-aaaaaa: cancelled, 0 survivors\n"
    assert say("status", "demo-a", "--json").document["runs"][0]["state"] == "cancelled"


def test_ps(say: Any, root: Path) -> None:
    views = [worker("a/0", pid=12, gpus=[0, 1, 2, 5], ports=[4000]), worker("eval/0", target="a/0")]
    make_run(root, "demo-aaaaaa", end=ended(RunState.COMPLETED), workers=views)
    shown = say("ps", "last", "--json").document["workers"]
    needed = {"worker", "role", "index", "node", "pid", "state", "target", "gpus", "ports", "restarts", "log"}
    assert needed | {"exit_status"} <= set(shown[0])
    assert [w["worker"] for w in say("ps", "last", "--role", "eval", "--json").document["workers"]] == ["eval/0"]
    assert "0-2,5" in say("ps", "last").out
    said = say("ps", "last", "--role", "evil")
    assert said.status == 2
    assert "it has a, eval" in said.err


def test_what_a_worker_said_is_never_markup(root: Path) -> None:
    make_run(root, "demo-aaaaaa", end=ended(RunState.FAILED, reason="[red]not[/red] \x1b[2Jmarkup\nat all"))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "slurmfork", "status"],
        env=environment(root, TERM="xterm"),
        stdout=theirs,
        cwd=REPOSITORY,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass  # a terminal whose other side has gone
    os.close(ours)
    assert process.wait(60) == 0
    assert b"[red]not[/red]" in shown
    assert b"\x1b[2J" not in shown
    assert b"demo-aaaaaa" in shown


# --- logs


@pytest.fixture
def logged(root: Path) -> RunDir:
    run = make_run(
        root,
        "demo-aaaaaa",
        end=ended(RunState.COMPLETED),
        workers=[worker("a/0"), worker("a/1"), worker("b-c/0")],
    )
    run.batch_log.write_text("the batch script\n")
    run.agent_log("n1").write_text("the agent\n")
    return run


def test_logs_merged(say: Any, logged: RunDir) -> None:
    assert say("logs", "last").out.splitlines() == [
        "a/0   | first of a/0",
        "a/0   | last of a/0",
        "a/1   | first of a/1",
        "a/1   | last of a/1",
        "b-c/0 | first of b-c/0",
        "b-c/0 | last of b-c/0",
    ]
    assert say("logs", "last", "a", "-n", "1").out == "a/0 | last of a/0\na/1 | last of a/1\n"
    assert say("logs", "last", "b-c", "--no-prefix").out == "first of b-c/0\nlast of b-c/0\n"
    assert say("logs", "last", "-f", "-n", "0").out == ""  # over: following ends at once


def test_logs_of_one(say: Any, logged: RunDir) -> None:
    logged.worker_log("a", 0).write_bytes(b"raw \xff bytes\rand no end")
    done = subprocess.run(
        [sys.executable, "-m", "slurmfork", "logs", "last", "a/0"],
        env=environment(logged.path.parent),
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == b"raw \xff bytes\rand no end"
    assert say("logs", "last", "a/1", "-n", "1").out == "last of a/1\n"
    assert say("logs", "last", "batch").out == "the batch script\n"
    assert say("logs", "last", "agent:n1").out == "the agent\n"


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ("a/7", "no log of a/7; there is"),
        ("rollout", "no role 'rollout'; it has a, b-c"),
        ("agent:n2", "no log of agent:n2"),
        ("agent:../../x", "is not a worker"),
        ("a/b/c", "is not a worker"),
    ],
)
def test_logs_of_what_is_not_there(say: Any, logged: RunDir, which: str, words: str) -> None:
    said = say("logs", "last", which)
    assert said.status == 2
    assert words in said.err


def test_logs_where_nobody_wrote(say: Any, root: Path) -> None:
    make_run(root, "demo-aaaaaa", end=ended(RunState.FAILED))
    said = say("logs", "last")
    assert (said.status, said.out) == (0, "")
    assert "slurmfork logs demo-aaaaaa batch" in said.err


# --- waiting


@pytest.mark.parametrize(
    ("state", "own", "status"),
    [
        (RunState.COMPLETED, 0, 0),
        (RunState.FAILED, 7, 7),
        (RunState.FAILED, None, 1),
        (RunState.CANCELLED, None, 1),
        (RunState.TIMEOUT, None, 1),
    ],
)
def test_wait_exits_with_the_run_s_status(say: Any, root: Path, state: RunState, own: int | None, status: int) -> None:
    make_run(root, "demo-aaaaaa", end=ended(state, status=own))
    said = say("wait", "last")
    assert said.status == status
    assert ("so it was" in said.err) == (status != 0)
    assert said.out.count("\n") == (status == 0)
    said = say("wait", "last", "--for", "ready", "--json")
    assert said.status == status
    assert said.document["state"] == state


def test_wait_has_an_end(say: Any, root: Path) -> None:
    make_run(root, "demo-aaaaaa")  # nothing was ever heard of it
    said = say("wait", "last", "--timeout", "0.2", "--json")
    assert said.status == 124
    assert said.document["kind"] == "timeout"
    assert "is not done after" in said.err


def test_a_start_that_failed_shows_the_batch_log(say: Any, root: Path) -> None:
    run = make_run(root, "demo-aaaaaa", end=ended(RunState.FAILED, status=3))
    run.batch_log.write_text("module: command not found\n")
    said = say("wait", "last")
    assert said.status == 3
    assert "  | module: command not found\n" in said.err


# --- tidying


def test_prune_removes_what_is_over_and_old(say: Any, root: Path, tmp_path: Path) -> None:
    make_run(root, "demo-old", age=9000, end=ended(RunState.FAILED, ago=8000))
    make_run(root, "demo-young", age=9000, end=ended(RunState.FAILED, ago=60))
    make_run(root, "demo-unknown", age=9000)
    outside = tmp_path / "outside"
    outside.mkdir()
    link = make_run(outside, "demo-link", age=9000, end=ended(RunState.COMPLETED, ago=8000)).path
    (root / "demo-link").symlink_to(link)
    inner = root / "demo-old" / "logs" / "link"
    inner.symlink_to(outside)
    said = say("prune", "--older-than", "2h", "--yes", "--json")
    assert said.document["removed"] == ["demo-old"]
    assert sorted(path.name for path in root.iterdir()) == ["demo-link", "demo-unknown", "demo-young"]
    assert link.is_dir()
    assert say("prune", "--older-than", "2h", "--yes").out == "0 runs removed\n"


def test_prune_asks_where_somebody_could_answer_and_refuses_elsewhere(say: Any, root: Path) -> None:
    make_run(root, "demo-old", age=9000, end=ended(RunState.FAILED, ago=8000))
    with open(os.devnull) as nobody:
        old, sys.stdin = sys.stdin, nobody
        try:
            said = say("prune", "--older-than", "1h")
        finally:
            sys.stdin = old
    assert said.status == 2
    assert "1 run would be removed; --yes" in said.err
    assert (root / "demo-old").is_dir()


def test_clean_looks_only_at_what_is_over(say: Any, root: Path) -> None:
    make_run(root, "demo-over", end=ended(RunState.CANCELLED))
    make_run(root, "demo-unknown")
    said = say("clean", "demo-unknown", "--json")
    assert said.status == 1
    assert said.document["kind"] == "not_over"
    assert "cancel it first" in said.err
    said = say("clean", "--all", "--json")
    assert said.status == 0
    assert (said.document["killed"], said.document["survivors"], said.document["unverified"]) == ([], 0, [])
    assert [run["run_id"] for run in said.document["runs"]] == ["demo-over"]


def test_cancel_of_what_is_over_says_how_it_ended(say: Any, root: Path) -> None:
    make_run(root, "demo-aaaaaa", end=ended(RunState.COMPLETED))
    left = EndRecord(state=RunState.CANCELLED, reason="", exit_status=None, survivors=2, unverified=["n7"], ended=1.0)
    make_run(root, "demo-bbbbbb", end=left)
    assert say("cancel", "demo-a").out == "demo-aaaaaa: completed, 0 survivors\n"
    said = say("cancel", "demo-a", "--json")
    assert (said.document["run_id"], said.document["state"], said.document["survivors"]) == (
        "demo-aaaaaa", "completed", 0
    )  # fmt: skip
    said = say("cancel", "demo-a", "demo-b", "demo-a", "--json")
    assert said.status == 1
    assert [run["survivors"] for run in said.document["runs"]] == [0, 2]
    assert "could not ask n7" in said.err
    said = say("cancel", "demo-a", "demo-nothing")
    assert said.status == 1
    assert said.out == ""  # a name that is wrong stops all of it, before anything is cancelled


def test_doctor(say: Any, root: Path) -> None:
    said = say("doctor", "--backend", "local", "--json")
    checks = {check["name"]: check for check in said.document["checks"]}
    assert said.status == (0 if all(check["ok"] for check in checks.values()) else 1)
    assert {"python", "packages", "containment", "limits", "root", "space", "clock", "slurm"} <= set(checks)
    assert checks["root"]["ok"]
    assert list(root.iterdir()) == []  # nothing is left of its probes
    root.chmod(0o777)
    said = say("doctor", "--backend", "local")
    assert said.status == 1
    assert re.search(r"^root +NO +.*chmod go-w", said.out, re.MULTILINE)
    assert say("doctor", "--backend", "local", "--root", "/proc/nowhere").status == 1


def test_doctor_s_packages_are_those_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    lines = config["options"]["install_requires"].split()
    everywhere = [line for line in lines if ";" not in line]
    assert dict(line.split(">=") for line in everywhere) == machine.PACKAGES


# --- small things


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("30s", 30), ("5m", 300), ("2h", 7200), ("7d", 604_800)]
)
def test_durations(text: str, seconds: float) -> None:
    assert Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "-1", "nan", "1e3", "5 m", "h", "1" * 400])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Seconds().convert(text, None, None)


def test_numbers_are_drawn_together() -> None:
    assert output.numbers([0, 1, 2, 3, 6]) == "0-3,6"
    assert output.numbers(["0", "1"]) == "0,1"
    assert output.numbers(["GPU-ab", 4, 5, 6]) == "GPU-ab,4-6"
    assert output.numbers([]) == ""


def test_spans_and_lines() -> None:
    assert [output.span(s) for s in (-3, 12, 99, 600, 7200, 10 * 86_400)] == [
        "0s",
        "12s",
        "99s",
        "10m",
        "2h",
        "10d",
    ]
    assert output.one_line("a\n b\x1b[2J\tc ") == "a b [2J c"
    assert [output.plural(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]


def test_prune_removes_what_a_killed_submit_had_only_begun(say: Any, root: Path) -> None:
    begun, fresh, other = (RunDir(root / f"{name}-abcdef") for name in ("begun", "fresh", "other"))
    for directory in (begun, fresh, other):
        directory.make()
    (other.path / "mine.txt").touch()
    for directory in (begun, other):
        os.utime(directory.path, (0, 0))
    say("prune", "--yes")
    assert not begun.path.exists()
    assert fresh.path.exists()
    assert other.path.exists()
