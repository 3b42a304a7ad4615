"""Another user of the same machine: reads nothing, gets in nowhere, and has nothing of others' killed.

The run directories lie where anybody may make files, as on many a shared file system, and the submitter's umask
takes nothing away, so that what protects a run is what the run does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import stranger
from cluster import Factory
from processes import Yard
from running import Shell

from slurmfork import credentials, names, process
from slurmfork.backends.local import LocalJob
from slurmfork.journal import Journal, Seen, Started
from slurmfork.process import Identity
from slurmfork.run import Run
from slurmfork.rundir import HeadRecord, RunDir, RunRecord
from slurmfork.scratch import node_directory, user_directory

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

SECRET = "hf_7d1f5c-which-nobody-else-may-see"
SPEC = """
    name: private
    nodes: 2
    local: {gpus-per-node: 1}
    setup: umask
    secrets: [HF_TOKEN]
    roles:
      rollout:
        per_node: 1
        gpus: 1
        ports: 1
        ready: {notify: true}
        command: "python3 -c 'import os, socket, time; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM);
          s.connect(os.environ[\\"NOTIFY_SOCKET\\"]); s.send(b\\"READY=1\\"); time.sleep(1000)'"
      eval:
        strategy: {type: colocation, target: rollout}
        autostart: false
        command: [sleep, "1000"]
"""


@pytest.fixture(scope="module")
def commons() -> Iterator[Path]:
    """A directory where anybody may make files."""
    path = Path(tempfile.mkdtemp(prefix="slurmfork-commons-"))
    for directory in (path, path / "runs"):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o1777)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def shell(commons: Path) -> Iterator[Shell]:
    """A user who is careless: umask 000."""
    made = Shell(commons, {"HF_TOKEN": SECRET}, umask=0)
    yield made
    made.end()


@pytest.fixture(scope="module")
def run(shell: Shell) -> Run:
    run = Run.load(shell.ready(shell.spec(SPEC), "--backend", "local"), shell.root)
    run.fork("eval")
    return run


def everything(directory: Path) -> list[Path]:
    return [directory, *directory.rglob("*")]


def open_to_others(paths: list[Path]) -> list[str]:
    return [f"{path}: {path.lstat().st_mode:o}" for path in paths if path.lstat().st_mode & 0o077]


# --- reading, and getting in -------------------------------------------------------------------------------


def test_nothing_of_a_run_is_open_to_others(run: Run) -> None:
    places = [*everything(run.rundir.path), user_directory()]
    for node in ("local0", "local1"):
        places += everything(node_directory(run.run_id, node))
    assert open_to_others(places) == []
    found = {path.name for path in places}
    assert found >= {
        "batch.log",
        "local.json",
        "local0.jsonl",
        "local1.log",
        "rollout-1.log",
        "client.pem",
        "agent.sock",
    }


def test_another_user_can_read_and_write_nothing(run: Run) -> None:
    paths = [str(path) for path in everything(run.rundir.path)]
    paths += [str(user_directory()), str(node_directory(run.run_id, "local0"))]
    assert set(stranger.ask("read", *paths).values()) == {"EACCES"}
    assert set(stranger.ask("write", *paths).values()) == {"EACCES"}
    assert stranger.ask("read", str(run.rundir.path.parent)) != {}, "it does not even get as far as that"


def test_another_user_sees_no_secret_in_any_process(run: Run) -> None:
    assert SECRET in process.environ(run.workers("rollout")[0].pid or 0).values()
    seen = stranger.ask("spy")
    assert any(run.run_id in text for text in seen), "it can look at command lines at all"
    assert not any(SECRET in text for text in seen)


def test_another_user_does_not_get_in(run: Run, commons: Path) -> None:
    assert stranger.ask("door", str(node_directory(run.run_id, "local0") / "agent.sock")) == "EACCES"
    record = run.rundir.read_record(run.rundir.head, HeadRecord)
    assert record is not None
    head = [record.addresses[0], str(record.port), credentials.server_name(run.run_id)]
    assert stranger.ask("head", *head) == "hung up"
    credentials.make(commons / "forged", run.run_id)
    for who in (credentials.CLIENT, credentials.AGENT, credentials.HEAD):
        assert stranger.ask("head", *head, str(commons / "forged" / f"{who}.pem")) == "hung up"
    own = str(run.rundir.credentials / "client.pem")
    assert stranger.ask("head", *head, own).startswith("HTTP/1.0 200"), "with the run's own it would"


# --- having others' processes killed -----------------------------------------------------------------------


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


def plant(root: Path, victim: Identity) -> RunDir:
    """The directory of a run that has ended with a process left, by all that is written in it."""
    rundir = RunDir(root / f"planted-{victim.pid}")
    rundir.make()
    record = RunRecord(
        run_id=rundir.run_id, name="planted", backend="local", submitted=0.0, cwd="/", user="root", job_id="1"
    )
    rundir.write_record(rundir.record, record)
    rundir.write_record(rundir.path / "local.json", LocalJob(host=os.uname().nodename, **victim._asdict()))
    rundir.write(rundir.batch_status, b"1\n")
    book = Journal(rundir.journal("local0"))
    started = Started(start_id="s", worker="a/0", uid=os.geteuid(), argv=["x"], **victim._asdict())
    book.append(started, Seen(worker="a/0", processes=[(victim.pid, victim.start_time)]))
    book.close()
    return rundir


def give_away(path: Path) -> None:
    for place in everything(path):
        os.chown(place, stranger.UID, stranger.UID, follow_symlinks=False)


def share_with_group(path: Path) -> None:
    path.chmod(0o770)


def share_with_all(path: Path) -> None:
    path.chmod(0o707)


def replace_by_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("planted", [give_away, share_with_group, share_with_all, replace_by_link])
def test_a_planted_run_directory_is_not_believed(shell: Shell, yard: Yard, planted: object, tmp_path: Path) -> None:
    """Whatever verb is told its name, or finds it: the process that it names is not touched."""
    root = tmp_path / "runs"
    root.mkdir()
    victim = yard.innocent("victim")
    rundir = plant(root, victim)
    assert callable(planted)
    planted(rundir.path)
    given = ["--root", str(root)]
    for verb in ("cancel", "clean", "stop", "status", "ps", "logs", "wait"):
        done = shell.call(verb, rundir.run_id, *(["a"] if verb == "stop" else []), *given)
        assert done.returncode == 1, (verb, done)
        assert "not believed" in done.stderr, (verb, done)
        assert len(done.stderr.splitlines()) == 1, (verb, done)
    for wanted in ("last", "1", rundir.run_id[:-1]):
        assert "no run" in shell.call("cancel", wanted, *given).stderr
    for verb in (["clean", "--all"], ["prune", "--yes", "--older-than", "0s"], ["status"]):
        done = shell.call(*verb, *given)
        assert done.returncode == 0, (verb, done)
    yard.assert_innocents_live()
    assert rundir.path.exists()


def test_the_same_directory_of_ones_own_is_believed(shell: Shell, yard: Yard, tmp_path: Path) -> None:
    """So that the test above proves something."""
    victim = yard.innocent("victim")
    rundir = plant(tmp_path / "runs", victim)
    done = shell.call("clean", rundir.run_id, "--root", str(rundir.path.parent))
    assert "1 process ended" in done.stdout, done
    assert not process.alive(victim)


@pytest.fixture
def tagged_by_another(run: Run, commons: Path) -> Iterator[list[Identity]]:
    """Processes of another user that carry the tag of our run; one of them is set-uid, and so looks like ours."""
    tag = {names.RUN_ID: run.run_id, names.NODE: "local0", names.RUN_DIR: str(run.rundir.path), "PATH": os.defpath}
    disguised = commons / "sleep"
    shutil.copy(shutil.which("sleep") or "", disguised)
    disguised.chmod(0o4755)
    children = [
        subprocess.Popen([program, "1000"], env=tag, user=stranger.UID, group=stranger.UID, extra_groups=[])
        for program in ("sleep", str(disguised))
    ]
    yield [one for child in children if (one := process.identify(child.pid))]
    for child in children:
        child.kill()
        child.wait()


def test_a_tag_in_another_users_environment_is_nothing(
    run: Run, shell: Shell, tagged_by_another: list[Identity]
) -> None:
    """The run ends, is swept, and another one tidies up after it, with no word of them.

    Afterwards nothing of it is open to others either.
    """
    assert len(tagged_by_another) == 2
    assert shell.json("cancel", run.run_id)["survivors"] == 0
    done = shell.json("clean", run.run_id)
    assert (done["killed"], done["survivors"]) == ([], 0)
    next_one = shell.ready(shell.spec("name: next\nroles: {a: {command: [sleep, '1000']}}\n"), "--backend", "local")
    assert all(map(process.alive, tagged_by_another))
    assert not any(node["notes"] for node in shell.status(next_one)["nodes"])
    sweeps = (run.rundir.path / "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line)["survivors"] for line in sweeps] == [[]]
    assert open_to_others(everything(run.rundir.path)) == []
    assert {path.name for path in run.rundir.path.iterdir()} >= {"batch.status", "sweep.jsonl", "end.json"}
    assert not node_directory(run.run_id, "local0").exists()


# --- where there was nothing -------------------------------------------------------------------------------


def test_what_is_made_above_a_run_directory_is_private(commons: Path, tmp_path: Path) -> None:
    """A parent that anybody could write to would let them put another directory in the place of ours."""
    shell = Shell(tmp_path, umask=0)
    spec = shell.spec("name: x\nbackend: local\nroles: {a: {command: 'true'}}\n")
    root = commons / "home" / ".slurmfork" / "runs"
    done = shell.call("run", str(spec), "--root", str(root))
    assert done.returncode == 0, done
    assert open_to_others(everything(commons / "home")) == []


def test_a_name_that_another_user_has_taken_hides_no_run(run: Run, shell: Shell) -> None:
    """`last`, a job id and a prefix are searched for, whatever directory has that name."""
    for name in ("last", str(run.job_id), run.run_id[:-2]):
        meant = Run.load(name, shell.root).rundir.path
        rundir = RunDir(shell.root / name)
        rundir.make()
        rundir.write_record(rundir.record, run.record)
        give_away(rundir.path)
        assert Run.load(name, shell.root).rundir.path == meant
        shutil.rmtree(rundir.path)


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_nothing_of_a_run_on_slurm_is_open_to_others(minicluster: Factory, tmp_path: Path) -> None:
    cluster = minicluster(nodes=4, gpus=8)
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"], "HF_TOKEN": SECRET}, umask=0)
    text = SPEC.replace("local: {gpus-per-node: 1}", "slurm: {gpus-per-node: 1}")
    run = Run.load(shell.ready(shell.spec(text)), shell.root)
    assert open_to_others(everything(run.rundir.path)) == []
    shell.end()
    assert open_to_others(everything(run.rundir.path)) == []
