"""``isolation: namespace``: real agents whose workers are in a PID namespace, ended in every way there is.

Run as whoever runs the tests; as root some are run once more as another user, and as a root that may do little.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import agent_rig
import pytest
from agent_rig import AWKWARD, PATIENCE, Rig, announced, opened, order, python
from cluster import Factory
from namespaced import (
    ROOT,
    again,
    as_nobody,
    common,
    in_namespace,
    inside,
    isolated,
    may_make_namespaces,
    pids_of,
    space_of,
)
from processes import Yard, kill_at_once, wait_until
from running import Shell

from slurmfork import journal, killing, names, process
from slurmfork.names import ISOLATION, WorkerState
from slurmfork.orders import Finding
from slurmfork.rundir import RunDir, RunRecord
from slurmfork.spec.model import Ready, Restart, Stop

CLONE_NEWNS = 0x20000
# A daemon that shed all that could give it away: its parents, its session, its environment, every descriptor.
SHED = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 1000)
        os.execve(sys.executable, [sys.executable, "-I", "-S", *sys.argv[1:]], {})
    os._exit(0)
os.wait()
os.execv(sys.executable, [sys.executable, "-I", "-S", sys.argv[1], "ignores-term", sys.argv[3], sys.argv[5]])
"""


pytestmark = pytest.mark.skipif(not may_make_namespaces(), reason="no PID namespaces for this user on this machine")


@pytest.fixture(scope="module", autouse=True)
def apart() -> None:
    """File systems of our own, where that is allowed: what is left here is then no business of other sessions' runs."""
    ctypes.CDLL(None).unshare(CLONE_NEWNS)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        yield rig


@pytest.fixture
def yard(tmp_path: Path) -> Path:
    directory = tmp_path / "yard"
    directory.mkdir()
    return directory


def brood(yard: Path, number: int) -> list[str]:
    """A worker that ignores SIGTERM, and a daemon of it that shed everything."""
    return python(SHED, str(AWKWARD), "plain", str(yard), f"daemon-{number}", f"worker-{number}")


EVERYBODY = ["0", "0", "4294967295"]  # the user namespace in which every user is himself


# --- what a worker sees ------------------------------------------------------------------------------------


LOOKS = """
import json, os, sys
outside = int(sys.argv[1])
def kill():
    try: os.kill(outside, 0)
    except ProcessLookupError: return "nobody"
    return "somebody"
status = open("/proc/self/status").read()
print(json.dumps({
    "own": os.readlink("/proc/self"), "getpid": str(os.getpid()),
    "seen": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()), "kill": kill(),
    "caps": [line.split()[1] for line in status.splitlines() if line.startswith("Cap")],
    "open": len(os.listdir("/proc/self/fd")) - 1,
    "ids": [os.geteuid(), os.getegid()], "parent": os.getppid(), "users": open("/proc/self/uid_map").read().split(),
}), flush=True)
import time; time.sleep(1000)
"""


async def test_a_worker_sees_the_inside_alone(rig: Rig) -> None:
    await isolated(rig)
    [view] = await rig.start(order("w/0", python(LOOKS, str(os.getpid()))))
    seen = json.loads((await rig.printed("w/0"))[0])
    assert seen["own"] == seen["getpid"] != str(view.pid)
    assert seen["seen"] == [1, int(seen["getpid"])]
    assert (seen["kill"], seen["parent"]) == ("nobody", 0)
    assert seen["ids"] == [os.geteuid(), os.getegid()]
    if seen["users"] != EVERYBODY:
        assert seen["users"] == [str(os.geteuid())] * 2 + ["1"]
        assert set(seen["caps"]) == {"0" * 16}  # of the bounding set too, or an exec would give them back to root
    else:
        assert os.geteuid() == 0
    assert inside(rig)[int(seen["getpid"])].pid == view.pid
    assert seen["open"] == 3  # so nothing that leads to another /proc
    await rig.end()


async def test_psutil_knows_the_worker_that_it_is_in(rig: Rig) -> None:
    script = "import os, psutil; print(psutil.Process().pid == os.getpid(), len(psutil.pids()), flush=True)"
    await isolated(rig)
    await rig.start(order("w/0", [sys.executable, "-c", script]))
    assert await rig.printed("w/0") == ["True 2"]
    await rig.end()


async def test_a_worker_learns_its_pid_on_the_node(rig: Rig) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport slurmfork, time\n"
        "print(slurmfork.current().host_pid, flush=True); time.sleep(1000)"
    )
    await isolated(rig)
    [view] = await rig.start(order("w/0", [sys.executable, "-c", script]))
    assert await rig.printed("w/0") == [str(view.pid)]
    await rig.end()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_multiprocessing(rig: Rig, yard: Path, method: str) -> None:
    script = yard / "pool.py"
    script.write_text(
        "import multiprocessing as m, os\n"
        "def work(number): return os.getppid() > 0 and number * number\n"
        f"if __name__ == '__main__':\n    with m.get_context({method!r}).Pool(2) as pool:\n"
        "        print(sum(pool.map(work, range(10))), flush=True)\n"
    )
    await isolated(rig)
    await rig.start(order("w/0", [sys.executable, str(script)]))
    assert (await rig.state("w/0", WorkerState.EXITED)).exit_status == 0
    assert await rig.printed("w/0") == ["285"]
    await rig.end()


CALLS = """
import http.client, json, os, socket, sys, time
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
if sys.argv[1] == "orphan":
    if os.fork(): time.sleep(1000)
    if os.fork(): os._exit(0)
    os.setsid()
    while os.getppid() != 1: time.sleep(0.001)
class Door(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(os.environ["SLURMFORK_AGENT"])
door = Door("x")
door.request("GET", "/v1/workers")
print(door.getresponse().status, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("who", ["worker", "orphan"])
async def test_its_readiness_and_its_calls_are_known_to_be_its_own(rig: Rig, who: str) -> None:
    await isolated(rig)
    await rig.start(order("w/0", python(CALLS, who), ready=Ready(notify=True)), order("w/1", ["sleep", "1000"]))
    await rig.state("w/0", WorkerState.READY)
    assert await rig.printed("w/0") == ["200"]
    assert [call.worker for call in rig.calls] == ["w/0"]
    await rig.end()


# --- the usual, in there -----------------------------------------------------------------------------------


async def test_a_daemon_belongs_to_its_worker_and_ends_with_it(rig: Rig, yard: Path) -> None:
    """It fell to init. It is in the journal by the PID that it has on the node, and stops with its worker."""
    await isolated(rig)
    command = agent_rig.brood(yard, "scrubbed", leader="ignores-term")
    await rig.start(order("w/0", command, stop=Stop(grace=0.2)), order("w/1", ["sleep", "1000"]))
    inner = await announced(rig, yard, "scrubbed", "leader")
    daemon, worker = inner["scrubbed"], inner["leader"]
    path = RunDir(rig.rundir.path).journal("n0")
    wait_until(lambda: daemon in [one.identity for one in journal.living(journal.read(path))], "the journal to have it")
    [result] = await rig.stop("w/0", grace=0.2)
    assert (result.survivors, result.killed) == ([], True)
    assert killing.wait_gone([daemon, worker], PATIENCE) == []
    assert len(inside(rig)) == 2  # init, and the other worker
    await rig.end()


async def test_a_worker_is_started_again(rig: Rig) -> None:
    await isolated(rig)
    [view] = await rig.start(order("w/0", ["sleep", "1000"], restart=Restart(policy="on-failure", max=1, backoff=0.01)))
    assert view.pid is not None
    os.kill(view.pid, signal.SIGKILL)
    again = await rig.view("w/0", lambda view: view.restarts == 1 and view.state is WorkerState.RUNNING)
    assert again.pid not in (None, view.pid)
    os.kill(again.pid or 0, signal.SIGTERM)
    assert "killed by SIGTERM" in (await rig.state("w/0", WorkerState.FAILED)).reason
    await rig.end()


async def test_it_stops_as_gracefully_as_without(rig: Rig, yard: Path) -> None:
    await isolated(rig)
    await rig.start(order("w/0", [sys.executable, "-I", "-S", str(AWKWARD), "graceful", str(yard), "graceful"]))
    await announced(rig, yard, "graceful")
    report = await rig.end(budget=PATIENCE)
    assert (report.survivors, (yard / "graceful.bye").exists()) == ([], True)
    assert rig.guardians["n0"].returncode == 0, rig.rundir.agent_log("n0").read_text()[-3000:]


async def test_what_an_ended_run_left_is_found_from_in_there(rig: Rig, tmp_path: Path) -> None:
    """By its environment, which who is in another user namespace may not read."""
    (tmp_path / "outside").mkdir()
    with Yard(tmp_path / "outside") as outside:
        old = RunDir(tmp_path / "old-run")
        old.make()
        (old.path / "end.json").write_text("0\n")
        record = RunRecord(run_id="old-run", name="old", backend="local", submitted=0.0, cwd="/", user="me")
        old.write_record(old.record, record)
        tags = {names.RUN_ID: "old-run", names.RUN_DIR: str(old.path), names.NODE: "n7"}
        one = outside.start("plain", env=tags)
        await isolated(rig)
        findings = await rig.ask("preflight", None, list[Finding])
        assert "ended 1 process left by run old-run" in [finding.text for finding in findings]
        assert killing.wait_gone([one], PATIENCE) == []
    await rig.end()


# --- every end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whom", ["agent", "guardian", "both"])
async def test_nothing_is_left_whoever_is_killed(rig: Rig, yard: Path, whom: str) -> None:
    """Nobody sweeps here, and what the daemons are can be known by nothing: not even by their place in a tree."""
    await isolated(rig)
    orders = [order(f"w/{number}", brood(yard, number), stop=Stop(grace=0.2)) for number in range(4)]
    await rig.start(*orders)
    await announced(rig, yard, *(f"{kind}-{number}" for number in range(4) for kind in ("worker", "daemon")))
    everyone = inside(rig)
    assert len(everyone) == 9
    space = space_of(everyone[1].pid)
    join = rig.agents["n0"].join
    victims = {"agent": [join.agent_pid], "guardian": [join.guardian_pid], "both": [join.guardian_pid, join.agent_pid]}
    kill_at_once(*victims[whom])
    await rig.gone()
    assert await asyncio.to_thread(killing.wait_gone, everyone.values(), PATIENCE) == []
    assert in_namespace(space) == []


async def test_they_are_asked_once_when_the_agent_dies(rig: Rig) -> None:
    counts = """
import signal, sys, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: (heard.append(1), print("asked", len(heard), flush=True)))
print("here", flush=True)
while True: time.sleep(1000)
"""
    await isolated(rig)
    await rig.start(order("w/0", python(counts)))
    await rig.printed("w/0")
    os.kill(rig.agents["n0"].join.agent_pid, signal.SIGKILL)
    await rig.gone()
    assert (await rig.printed("w/0", lines=2)) == ["here", "asked 1"]


async def test_they_are_asked_when_agent_and_guardian_die(rig: Rig, yard: Path) -> None:
    await isolated(rig, SLURMFORK_GUARDIAN_GRACE=str(PATIENCE))
    await rig.start(order("w/0", [sys.executable, "-I", "-S", str(AWKWARD), "graceful", str(yard), "graceful"]))
    await announced(rig, yard, "graceful")
    everyone = inside(rig)
    join = rig.agents["n0"].join
    kill_at_once(join.guardian_pid, join.agent_pid)
    await rig.gone()
    assert await asyncio.to_thread(killing.wait_gone, everyone.values(), PATIENCE) == []
    assert (yard / "graceful.bye").exists()


BOMB = """
import os, resource, signal, sys, time
resource.setrlimit(resource.RLIMIT_NPROC, (int(sys.argv[1]),) * 2)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("lit", flush=True)
os.closerange(0, 3)
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError:
        time.sleep(0.1)
"""


@pytest.mark.skipif(os.geteuid() == 0, reason="the limit does not hold for root")
async def test_a_fork_bomb_is_put_out(rig: Rig) -> None:
    await isolated(rig)
    await rig.start(order("w/0", python(BOMB, "200")))
    await rig.printed("w/0")
    await rig.until(lambda: len(inside(rig)) > 100, "it to go off")
    space = space_of(inside(rig)[1].pid)
    join = rig.agents["n0"].join
    kill_at_once(join.guardian_pid, join.agent_pid)
    await rig.gone()
    wait_until(lambda: in_namespace(space) == [], "all of it to be gone")


@pytest.mark.skipif(os.geteuid() == 0, reason="the limit does not hold for root")
async def test_a_fork_bomb_ends_by_order(rig: Rig) -> None:
    """What forks faster than it is killed is ended with the namespace before anybody is told how many survived."""
    await isolated(rig)
    await rig.start(order("w/0", python(BOMB, "300"), stop=Stop(grace=0.2)))
    await rig.printed("w/0")
    await rig.until(lambda: len(inside(rig)) > 200, "it to go off")
    space = space_of(inside(rig)[1].pid)
    report = await rig.end(budget=None)
    assert report.survivors == []
    assert [result.survivors for result in report.results] == [[]]
    assert in_namespace(space) == []
    assert rig.guardians["n0"].returncode == 0, rig.rundir.agent_log("n0").read_text()[-3000:]


async def test_without_init_there_is_no_more_to_be_done_on_the_node(rig: Rig) -> None:
    await isolated(rig)
    await rig.start(order("w/0", ["sleep", "1000"]))
    os.kill(inside(rig)[1].pid, signal.SIGKILL)
    assert await rig.gone() != 0
    assert "init of this node's PID namespace" in rig.agents["n0"].going[0]


# --- where it is not to be had -----------------------------------------------------------------------------


FILTER = """
import ctypes, os, struct, sys
number = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
class Program(ctypes.Structure): _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(program)))) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""


def in_own(script: str) -> list[str]:
    """A command that does something in user and mount namespaces of its own, where it may, and becomes the next."""
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh"]


REFUSING = {
    "limit": (in_own("echo 0 >/proc/sys/user/max_pid_namespaces"), "user.max_pid_namespaces is 0"),
    "masked": ([*in_own("mount -t tmpfs none /proc/tty"), "unshare", "--user", "--map-root-user"], "a masked /proc"),
    "seccomp": (python(FILTER), "a seccomp filter"),
}


@pytest.mark.parametrize("how", REFUSING)
async def test_the_setting_is_named_where_there_can_be_none(rig: Rig, how: str) -> None:
    under, why = REFUSING[how]
    end = await rig.agent(under=under, **{ISOLATION: "auto"})
    assert end.join.guarantee == "rings"
    assert why in end.join.no_namespace
    await rig.start(order("w/0", ["sleep", "1000"]))
    await rig.end()


@pytest.mark.parametrize("how", [None, *REFUSING])
def test_doctor_says_whether_there_can_be_one(how: str | None) -> None:
    under, why = REFUSING[how] if how else ([], "a PID namespace can be had")
    doctor = [*under, sys.executable, "-m", "slurmfork", "doctor", "--backend", "local", "--json"]
    done = subprocess.run(doctor, capture_output=True, text=True, timeout=PATIENCE, check=False)
    [check] = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "isolation"]
    assert why in check["detail"]


def test_a_run_that_wants_one_fails_at_once_where_there_is_none(local: Shell) -> None:
    under, why = REFUSING["limit"]
    spec = local.spec("""
        name: strict
        isolation: namespace
        roles: {w: {command: [sleep, "1000"]}}
    """)
    submit = [*under, sys.executable, "-m", "slurmfork", "submit", "--json", str(spec), "--backend", "local"]
    done = subprocess.run(submit, env=local.env, cwd=local.directory, capture_output=True, text=True, check=True)
    run_id = json.loads(done.stdout)["run_id"]
    local.runs.append(run_id)
    waited = local.call("wait", run_id)
    assert (waited.returncode, why in waited.stdout + waited.stderr) == (1, True)
    status = local.status(run_id)
    assert status["state"] == "failed"
    assert "`isolation: namespace` is not to be had: node local0" in status["reason"]
    assert local.ps(run_id) == [] or all(view["pid"] is None for view in local.ps(run_id))


def test_a_run_that_can_do_without_says_so(local: Shell) -> None:
    under, why = REFUSING["limit"]
    spec = local.spec("""
        name: lenient
        isolation: auto
        roles: {w: {command: [sleep, "1000"]}}
    """)
    submit = [*under, sys.executable, "-m", "slurmfork", "submit", "--json", str(spec), "--backend", "local"]
    done = subprocess.run(submit, env=local.env, cwd=local.directory, capture_output=True, text=True, check=True)
    run_id = json.loads(done.stdout)["run_id"]
    local.runs.append(run_id)
    local.call("wait", run_id, "--for", "ready")
    [node] = local.status(run_id)["nodes"]
    assert node["guarantee"] == "rings"
    assert any(why in note for note in node["notes"])
    events = [json.loads(line) for line in (local.root / run_id / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["kind"] == "isolation"]
    assert (event["node"], event["state"], why in event["message"]) == ("local0", "rings", True)


# --- whole runs --------------------------------------------------------------------------------------------

RUN = """
    name: boxed
    nodes: 2
    isolation: {isolation}
    roles:
      w:
        per_node: 1
        stop: {{grace: 1}}
        command: {command}
      child:
        strategy: {{type: colocation, target: w}}
        autostart: false
        command: {command}
"""


def spaces(local: Shell, run_id: str) -> set[str]:
    return {space_of(view["pid"]) for view in local.ps(run_id)}


def test_forks_and_cancel_of_a_whole_run(local: Shell, yard: Path) -> None:
    """Each node has its own; nothing of it is there when the run has been cancelled."""
    command = json.dumps(brood(yard, 0))
    run_id = local.ready(local.spec(RUN.format(command=command, isolation="namespace")), "--backend", "local")
    views = local.json("fork", run_id, "child")["workers"]
    assert len(views) == 2
    assert [node["guarantee"] for node in local.status(run_id)["nodes"]] == ["namespace"] * 2
    both = spaces(local, run_id)
    assert len(both) == 2
    assert all(pids_of(view["pid"])[0] == view["pid"] for view in local.ps(run_id))
    assert local.json("stop", run_id, "child")["survivors"] == 0
    assert spaces(local, run_id) - {""} == both
    assert local.json("cancel", run_id)["survivors"] == 0
    assert [in_namespace(space) for space in both] == [[], []]


@pytest.mark.slurm
@pytest.mark.timeout(300)
@pytest.mark.parametrize("strike", ["scancel --full", "slurmstepd and agents"])
def test_on_slurm_without_cgroups(tmp_path: Path, yard: Path, minicluster: Factory, strike: str) -> None:
    cluster = minicluster(nodes=2, gpus=2, proctrack="linuxproc")
    shell = Shell(tmp_path, {"SLURM_CONF": cluster.env["SLURM_CONF"]})
    try:
        run_id = shell.ready(shell.spec(RUN.format(command=json.dumps(brood(yard, 0)), isolation="namespace")))
        job = shell.status(run_id)["job_id"]
        both = spaces(shell, run_id)
        assert len(both) == 2
        if strike == "scancel --full":
            cluster.run(["scancel", "-s", "KILL", "--full", job])
        else:
            nodes = shell.status(run_id)["nodes"]
            stepds = {_above(node["guardian_pid"], "slurmstepd") for node in nodes}
            kill_at_once(*stepds, *(pid for node in nodes for pid in (node["guardian_pid"], node["agent_pid"])))
        wait_until(lambda: not any(in_namespace(space) for space in both), "all of it to be gone")
    finally:
        shell.end()


def _above(pid: int, name: str) -> int:
    """The nearest process of this name above another."""
    stat = process.parse_stat(Path(f"/proc/{pid}/stat").read_bytes())
    assert stat is not None
    return stat.parent if process.name(stat.parent).startswith(name) else _above(stat.parent, name)


# --- as others ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("who", ["nobody", "a root that may not mount"])
def test_all_of_this_as(who: str) -> None:
    with common() as commons:
        under = as_nobody(commons) if who == "nobody" else ["setpriv", "--bounding-set", "-sys_admin"]
        again(under, commons, __file__, "-k", "not all_of_this_as and not slurm")
