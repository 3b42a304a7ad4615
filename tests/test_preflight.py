"""Preflight: what an agent finds on its node before anything is started, what it ends there, and what never."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from agent_rig import Rig, opened, order, python
from cluster import Factory
from processes import Yard, wait_until
from running import Shell, environ_of

from slurmfork import names, process, shm
from slurmfork.agent import holders
from slurmfork.agent.holders import App, Holder
from slurmfork.orders import Finding
from slurmfork.process import Identity
from slurmfork.rundir import RunDir, RunRecord
from slurmfork.shm import SharedMemory

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as two users")


CLONE_NEWNS = 0x20000


@pytest.fixture(scope="module", autouse=True)
def apart() -> None:
    """File systems of our own, where that is allowed: what is left here is then no business of other sessions' runs."""
    ctypes.CDLL(None).unshare(CLONE_NEWNS)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    with Yard(tmp_path) as yard:
        yield yard


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Four device files; that they are no devices nobody asks."""
    found = [tmp_path / f"gpu{number}" for number in range(4)]
    for path in found:
        path.touch()
    return found


def listed(files: list[Path]) -> str:
    return ",".join(map(str, files))


async def found(rig: Rig, kind: str) -> list[Finding]:
    """What a look finds, of one kind."""
    return [one for one in await rig.ask("preflight", None, list[Finding]) if one.kind == kind]


def holding(path: Path, yard: Yard, *, user: int | None = None, **env: str) -> Identity:
    """A process that has a file open."""
    become = f"setpriv --reuid={user} --clear-groups " if user else ""
    child = yard.run(["sh", "-c", f'exec 9<"$0"; exec {become}sleep 300', str(path)], env=env)
    wait_until(lambda: process.name(child.pid) == "sleep", "the holder to be there")
    one = process.identify(child.pid)
    assert one is not None
    return one


def script(directory: Path, name: str, text: str) -> None:
    """A program on the path of who has ``directory`` in it."""
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# --- devices


async def test_a_device_that_another_process_holds_is_told_with_all_that_is_known(
    rig: Rig, yard: Yard, files: list[Path]
) -> None:
    await rig.agent(devices="1,2", SLURMFORK_DEVICE_FILES=listed(files))
    assert await found(rig, "devices") == []
    holder = holding(files[2], yard)
    holding(files[0], yard)  # of a device that was not granted
    holding(files[1], yard, **{names.RUN_ID: rig.run_id, names.NODE: "n0"})  # our own
    [finding] = await found(rig, "devices")
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    since = time.strftime("%Y-%m-%d", time.localtime(process.begun(holder)))
    assert finding.serious
    assert finding.text.startswith(f"GPU 2 is held by {user}: pid {holder.pid} (sleep 300), since {since} ")


async def test_of_many_holders_the_first_are_named(rig: Rig, yard: Yard, files: list[Path]) -> None:
    await rig.agent(devices="0,1", SLURMFORK_DEVICE_FILES=listed(files))
    pids = sorted(holding(files[number % 2], yard, **{names.RUN_ID: yard.run_id}).pid for number in range(5))
    [finding] = await found(rig, "devices")
    assert "GPU 0,1 is held by 5 processes of " in finding.text
    assert f"'s run {yard.run_id}: pid {pids[0]} " in finding.text
    assert finding.text.endswith("; and 2 more")


async def test_slurms_own_numbers_go_over_what_a_worker_sees(rig: Rig, yard: Yard, files: list[Path]) -> None:
    await rig.agent(devices="0,1", SLURM_STEP_GPUS="2,3", SLURMFORK_DEVICE_FILES=listed(files))
    holding(files[0], yard)
    holding(files[3], yard)
    [finding] = await found(rig, "devices")
    assert finding.text.startswith("GPU 1 is held by ")


async def test_devices_that_others_share_by_design_are_not_looked_at(rig: Rig, yard: Yard, files: list[Path]) -> None:
    await rig.agent(devices="0", SLURM_SHARDS_ON_NODE="2", SLURMFORK_DEVICE_FILES=listed(files))
    holding(files[0], yard)
    assert await found(rig, "devices") == []


@needs_root
async def test_another_users_holder_is_told_by_name(rig: Rig, yard: Yard, files: list[Path]) -> None:
    await rig.agent(devices="0", SLURMFORK_DEVICE_FILES=listed(files))
    holding(files[0], yard, user=NOBODY)
    [finding] = await found(rig, "devices")
    assert "GPU 0 is held by nobody: pid " in finding.text


async def test_memory_is_told_where_nvidia_smi_knows_it(
    rig: Rig, yard: Yard, files: list[Path], tmp_path: Path
) -> None:
    holder = holding(files[0], yard)
    answer = f"warning: persistence mode is off\\n00000000:1B:00.0, {holder.pid}, 40000\\n00000000:1B:00.0, 1, [N/A]"
    script(tmp_path / "bin", "nvidia-smi", f"printf '{answer}\\n'")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    await rig.agent(devices="0", PATH=path, SLURMFORK_DEVICE_FILES=listed(files))
    [finding] = await found(rig, "devices")
    assert f"pid {holder.pid} (sleep 300), 39.1 GiB, since " in finding.text


async def test_what_nvidia_smi_complains_of_is_told(rig: Rig, files: list[Path], tmp_path: Path) -> None:
    script(tmp_path / "bin", "nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    await rig.agent(devices="0", PATH=path, SLURMFORK_DEVICE_FILES=listed(files))
    words = "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch"
    assert await found(rig, "devices") == [Finding(kind="devices", text=words)]


@pytest.mark.slow
async def test_an_nvidia_smi_that_hangs_is_given_up_and_ended(rig: Rig, files: list[Path], tmp_path: Path) -> None:
    script(tmp_path / "bin", "nvidia-smi", "exec sleep 301")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    await rig.agent(devices="0", PATH=path, SLURMFORK_DEVICE_FILES=listed(files))
    assert [one.text for one in await found(rig, "devices")] == ["nvidia-smi gave no answer within 8 s"]
    await rig.until(lambda: not any("sleep 301" in line for line in rig.left()), "nvidia-smi to be gone")


def test_who_computes_elsewhere_holds_nothing_here(tmp_path: Path, yard: Yard) -> None:
    """CUDA opens the files of all GPUs; nvidia-smi knows where a process computes."""
    for bus, minor in (("0000:1b:00.0", 0), ("0000:1c:00.0", 1)):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t NVIDIA X\nDevice Minor: \t {minor}\n")
    minors = holders.minors(tmp_path)
    assert minors == {"0:1b:00.0": 0, "0:1c:00.0": 1}
    here, there, both, idle = (holding(tmp_path, yard).pid for _ in range(4))
    known = {pid: Holder(pid, {7}) for pid in (here, there, both, idle)}
    text = "\n".join(
        f"00000000:{bus}:00.0, {pid}, 1000"
        for bus, pid in [("1B", here), ("1C", there), ("1B", both), ("1C", both), ("1B", os.getpid())]
    )
    holders.by_memory(known, {"/dev/nvidia0": 7}, holders.apps(text), minors)
    assert {pid: holder.memory for pid, holder in known.items()} == {here: 1000, both: 1000, idle: 0}
    assert holders.apps("0000:1B:00.0, 12, [N/A]\nNo devices were found") == [App("0:1b:00.0", 12, 0)]


# --- leftovers


def ended_run(directory: Path, *, how: str = "end.json", job_id: str | None = None) -> RunDir:
    """The directory of a run that is over, or as ``how`` has it."""
    rundir = RunDir(directory / f"old-{secrets.token_hex(3)}")
    rundir.make()
    record = RunRecord(
        run_id=rundir.run_id,
        name="old",
        backend="slurm" if job_id else "local",
        submitted=0.0,
        cwd="/",
        user="me",
        job_id=job_id,
    )
    rundir.write_record(rundir.record, record)
    if how:
        (rundir.path / how).write_text("0\n")
    return rundir


def tags(rundir: RunDir, **more: str) -> dict[str, str]:
    return {names.RUN_ID: rundir.run_id, names.RUN_DIR: str(rundir.path), names.NODE: "n7", **more}


async def test_what_ended_runs_left_is_ended_and_told(rig: Rig, yard: Yard, tmp_path: Path) -> None:
    one, other = ended_run(tmp_path), ended_run(tmp_path, how="batch.status", job_id="42")
    gone = ended_run(tmp_path)
    shutil.rmtree(gone.path)
    left = [
        yard.start("plain", env=tags(one)),
        yard.start("ignores-term", env=tags(one)),
        yard.start("stopped", env=tags(one)),
        yard.start("daemon", env=tags(other, SLURM_JOB_ID="42")),
        yard.start("plain", "of-gone", env=tags(gone)),
    ]
    await rig.agent()
    findings = {finding.text: finding.serious for finding in await found(rig, "leftovers")}
    for text in (
        f"ended 3 processes left by run {one.run_id}",
        f"ended 1 process left by run {other.run_id}",
        f"ended 1 process left by run {gone.run_id}",
    ):
        assert findings[text] is False
    assert not any(process.alive(one) for one in left)


async def test_nothing_of_a_run_that_may_be_alive_is_touched(rig: Rig, yard: Yard, tmp_path: Path) -> None:
    over, alive = ended_run(tmp_path), ended_run(tmp_path, how="")
    slurm, damaged, gone = ended_run(tmp_path, job_id="42"), ended_run(tmp_path), ended_run(tmp_path)
    damaged.record.write_text("{")
    shutil.rmtree(gone.path)
    elsewhere = RunDir(tmp_path / "not-mounted" / "old-abcdef")
    kept = ended_run(tmp_path)
    shutil.copy(shutil.which("sleep") or "", tmp_path / "slurmfork-agent")
    agent = yard.run([str(tmp_path / "slurmfork-agent"), "300"], env=tags(kept))
    wait_until(lambda: process.name(agent.pid) == "slurmfork-agent", "the agent to be there")
    innocents = {
        "of a run without an end": tags(alive),
        "of a run whose agent lives": tags(kept),
        "in a job that a worker submitted": tags(slurm, SLURM_JOB_ID="43"),
        "in a job beside a local run": tags(over, SLURM_JOB_ID="43"),
        "in a job of a run that is gone": tags(gone, SLURM_JOB_ID="42"),
        "of a run with a damaged record": tags(damaged),
        "of a run whose file system is not there": tags(elsewhere),
        "of no node": {names.RUN_ID: over.run_id, names.RUN_DIR: str(over.path)},
        "of another directory": {**tags(over), names.RUN_ID: "other-abcdef"},
        "of a relative directory": {**tags(over), names.RUN_DIR: over.run_id},
        "of nobody": {},
    }
    for name, env in innocents.items():
        yard.innocent(name, **env)
    witness = yard.start("plain", "witness", env=tags(over))
    await rig.agent()
    texts = [finding.text for finding in await found(rig, "leftovers")]
    assert f"ended 1 process left by run {over.run_id}" in texts
    assert not process.alive(witness)
    yard.assert_innocents_live()
    assert agent.poll() is None


@needs_root
async def test_who_sees_other_file_systems_is_left_alone(rig: Rig, yard: Yard, tmp_path: Path) -> None:
    apart = yard.run(["unshare", "--mount", "sleep", "300"], env=tags(ended_run(tmp_path)))
    wait_until(lambda: process.name(apart.pid) == "sleep", "the process to be there")
    witness = yard.start("plain", "witness", env=tags(ended_run(tmp_path)))
    await rig.agent()
    await found(rig, "leftovers")
    assert not process.alive(witness)
    assert apart.poll() is None


# --- places


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """A small file system of its own."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


async def test_scratch_that_is_missing_is_serious(rig: Rig, tmp_path: Path) -> None:
    await rig.agent(TMPDIR=str(tmp_path / "nowhere"))
    assert await found(rig, "scratch") == [
        Finding(kind="scratch", serious=True, text=f"{tmp_path / 'nowhere'} is missing")
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=1M", "is full: 1 MiB free"),
        ("nr_inodes=1", "is full: no inodes free"),
        ("ro", "cannot be written to"),
    ],
)
async def test_scratch_that_takes_nothing_is_serious(rig: Rig, tmp_path: Path, options: str, words: str) -> None:
    with mounted(tmp_path / "small", options):
        await rig.agent(TMPDIR=str(tmp_path / "small"))
        [finding] = await found(rig, "scratch")
        assert (finding.serious, finding.text) == (True, f"{tmp_path / 'small'} {words}")


# --- the clock


@pytest.mark.parametrize(
    ("off", "words", "serious"),
    [
        (-3600.0, r"its clock is 3[56]\d\d s ahead of the head's", True),
        (100.0, r"its clock is (\d\d|100) s behind the head's", False),
        (0.0, "", False),
    ],
)
async def test_a_wrong_clock_is_told(rig: Rig, off: float, words: str, serious: bool) -> None:
    rig.welcome.time = time.time() + off
    await rig.agent()
    findings = await found(rig, "clock")
    assert [finding.serious for finding in findings] == ([serious] if words else [])
    assert re.fullmatch(words, "".join(finding.text for finding in findings))


# --- shared memory


@pytest.fixture
def stem() -> Iterator[str]:
    """What the names of a test's files in /dev/shm begin with."""
    stem = f"slurmfork-test-{secrets.token_hex(4)}"
    yield stem
    for path in Path(shm.SHM).glob(f"{stem}*"):
        path.unlink()


def there(stem: str) -> set[str]:
    return {path.name.removeprefix(stem) for path in Path(shm.SHM).glob(f"{stem}*")}


HOLD = """
import mmap, os, sys
kind, path = sys.argv[1:]
if kind == "opens":
    file = open(path, "a")
elif kind == "reads":
    file = open(path)
else:
    access = mmap.ACCESS_WRITE if kind == "maps" else mmap.ACCESS_READ
    held = mmap.mmap(os.open(path, os.O_RDWR if kind == "maps" else os.O_RDONLY), 0, access=access)
    os.closerange(3, 64)
print("here", flush=True)
sys.stdin.read()
"""


def user_of(stem: str, kind: str, name: str) -> subprocess.Popen[bytes]:
    """A child of this process that uses a file there; ends when its standard input does."""
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", HOLD, kind, f"{shm.SHM}/{stem}{name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"here\n"
    return child


def end(*children: subprocess.Popen[bytes]) -> None:
    for child in children:
        child.communicate(timeout=60)


def test_only_files_that_a_process_of_the_run_writes_are_removed(stem: str) -> None:
    before = user_of(stem, "opens", "-before")
    memory = SharedMemory("no-such-run")
    for name in ("-read", "-mapped", "-others"):
        Path(f"{shm.SHM}/{stem}{name}").write_text("something")
    children = [
        before,
        user_of(stem, "reads", "-read"),
        user_of(stem, "views", "-read"),
        user_of(stem, "opens", "-open"),
        user_of(stem, "maps", "-mapped"),
    ]
    memory.look()
    assert memory.remove() == []
    end(*children)
    assert memory.remove() == [f"{stem}-mapped", f"{stem}-open"]
    assert there(stem) == {"-before", "-read", "-others"}


def test_a_new_file_of_the_same_name_is_another(stem: str) -> None:
    memory = SharedMemory("no-such-run")
    ours = user_of(stem, "opens", "-a")
    memory.look()
    end(ours)
    Path(f"{shm.SHM}/{stem}-b").touch()
    Path(f"{shm.SHM}/{stem}-b").rename(f"{shm.SHM}/{stem}-a")
    assert memory.remove() == []


def test_what_is_still_in_use_stays(stem: str) -> None:
    memory = SharedMemory("no-such-run")
    ours = [user_of(stem, "opens", name) for name in ("-a", "-b", "-c")]
    memory.look()
    Path(f"{shm.SHM}/{stem}-a").write_text("something")
    others = [user_of(stem, "views", "-a"), user_of(stem, "reads", "-b")]
    end(*ours)
    assert memory.remove() == [f"{stem}-c"]
    end(*others)
    assert there(stem) == {"-a", "-b"}


async def test_at_the_end_of_a_node_its_shared_memory_goes(rig: Rig, stem: str) -> None:
    await rig.agent()
    text = (
        "import os, subprocess, sys\n"
        f"open('{shm.SHM}/{stem}-' + os.environ['SLURMFORK_RUN_ID'], 'w').close()\n"
        f"file = open('{shm.SHM}/{stem}-seen', 'w')\n"
        f"open('{shm.SHM}/{stem}-closed', 'w').close()\n"
        "print(subprocess.Popen(['sleep', '300']).pid, flush=True)\n"
        "sys.stdin.read() or os.read(os.eventfd(0), 8)"
    )
    await rig.start(order("a/0", python(text)))
    [pid] = await rig.printed("a/0")
    journal = rig.rundir.journal("n0")
    await rig.until(lambda: f"[{pid}," in journal.read_text(), "a look at the worker's tree")
    assert there(stem) == {f"-{rig.run_id}", "-seen", "-closed"}
    await rig.end()
    assert there(stem) == {"-closed"}


async def test_a_killed_agents_guardian_removes_what_bears_the_runs_name(rig: Rig, stem: str) -> None:
    end_of_agent = await rig.agent()
    path = Path(f"{shm.SHM}/{stem}-{rig.run_id}")
    path.touch()
    os.kill(end_of_agent.join.agent_pid, signal.SIGKILL)
    await rig.gone()
    assert there(stem) == set()


# --- whole runs

SPEC = """
name: looked-at
preflight: {mode}
nodes: 2
local: {{gpus-per-node: 1}}
roles:
  rollout: {{replicas: 2, gpus: 1, command: [sleep, "1000"]}}
"""


@pytest.fixture
def gpus(local: Shell, files: list[Path]) -> list[Path]:
    """The user's machine has GPUs with these files."""
    local.env |= {"CUDA_VISIBLE_DEVICES": "0,1", "SLURMFORK_DEVICE_FILES": listed(files)}
    return files


def test_a_run_that_refuses_fails_before_anything_is_started(local: Shell, yard: Yard, gpus: list[Path]) -> None:
    holder = holding(gpus[1], yard)
    done = local.call("submit", str(local.spec(SPEC.format(mode="refuse"))), "--backend", "local", "--wait")
    local.runs.append(done.stdout.split()[0])
    assert done.returncode == 1
    status = local.status(local.runs[0])
    assert (status["state"], status["exit_status"], status["workers"]["total"]) == ("failed", 1, 0)
    reason = rf"preflight found node local1: GPU 1 is held by \S+ pid {holder.pid} \(sleep 300\), since .*"
    assert re.fullmatch(reason + "; with `preflight: warn` the run starts all the same", status["reason"])
    assert status["reason"] in done.stderr
    assert process.alive(holder)


def test_a_run_that_warns_tells_and_starts(local: Shell, yard: Yard, gpus: list[Path]) -> None:
    holding(gpus[0], yard)
    run_id = local.ready(local.spec(SPEC.format(mode="warn")), "--backend", "local")
    notes = [[note for note in node["notes"] if "GPU" in note] for node in local.status(run_id)["nodes"]]
    assert [len(some) for some in notes] == [1, 0]
    assert f"node local0: {notes[0][0]}" in local.call("status", run_id).stdout
    wait_until(lambda: '"kind":"preflight"' in events(local, run_id), "the event to be on the disk")
    told = [one for one in map(msgspec.json.decode, events(local, run_id).splitlines()) if one["kind"] == "preflight"]
    assert (told[0]["state"], told[0]["node"], told[0]["message"]) == ("serious", "local0", notes[0][0])


def events(local: Shell, run_id: str) -> str:
    return (local.root / run_id / "events.jsonl").read_text()


def test_a_run_that_does_not_care_looks_at_nothing(local: Shell, yard: Yard, gpus: list[Path]) -> None:
    holding(gpus[0], yard)
    over = ended_run(local.directory)
    yard.innocent("left", **tags(over))
    run_id = local.ready(local.spec(SPEC.format(mode="off")), "--backend", "local")
    assert [node["notes"] for node in local.status(run_id)["nodes"]] == [[], []]
    yard.assert_innocents_live()


def test_a_run_ends_what_an_ended_one_left_and_leaves_a_living_one_alone(local: Shell, yard: Yard) -> None:
    spec = local.spec("{name: simple, roles: {a: {command: [sleep, '1000']}}}")
    ended, living = local.ready(spec, "-b", "local"), local.ready(spec, "-b", "local")
    local.json("cancel", ended)
    stray = yard.start("plain", "of-ended", env=tags(RunDir(local.root / ended)))
    yard.innocent("of-living", **tags(RunDir(local.root / living)))
    worker = local.ps(living)[0]["pid"]
    last = local.ready(spec, "-b", "local")
    notes = local.status(last)["nodes"][0]["notes"]
    assert f"ended 1 process left by run {ended}" in notes
    assert not any(living in note for note in notes)
    assert not process.alive(stray)
    yard.assert_innocents_live()
    assert local.ps(living)[0]["pid"] == worker
    assert local.status(living)["state"] == "ready"


@pytest.mark.slurm
@pytest.mark.timeout(180)
def test_on_slurm_the_devices_are_those_of_gres_conf(minicluster: Factory, yard: Yard, tmp_path: Path) -> None:
    cluster = minicluster(nodes=4, gpus=8)
    gpus = sorted((cluster.home / "gpus").iterdir())
    if gpus[0].is_symlink():
        pytest.skip("no devices can be made here")
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    text = """
        name: looked-at
        preflight: refuse
        nodes: 1
        slurm: {{nodelist: {node}, gpus-per-node: 4}}
        setup: export SLURMFORK_DEVICE_FILES={files}
        roles: {{a: {{replicas: 4, gpus: 1, command: [sleep, "1000"]}}}}
    """
    spec = shell.spec(text.format(node=cluster.nodes[0], files=listed(gpus)))
    holder = holding(gpus[5], yard)
    first = shell.ready(spec)
    assert {gpu for view in shell.ps(first) for gpu in view["gpus"]} == {0, 1, 2, 3}
    agent = shell.status(first)["nodes"][0]["agent_pid"]
    assert environ_of(agent)["SLURM_STEP_GPUS"] == "0,1,2,3"
    done = shell.call("submit", str(spec), "--wait")
    assert done.returncode == 1
    assert f"preflight found node {cluster.nodes[0]}: GPU 5 is held by" in done.stderr
    assert f"pid {holder.pid} (sleep 300)" in done.stderr
    shell.end()
