"""What people run in workers works in a namespace as it does without: each of it for real, as whoever runs the tests.

As root all of it is run once more as another user, who has a user namespace around it, and a supplementary group.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from multiprocessing import shared_memory
from pathlib import Path

import pytest
from agent_rig import PATIENCE, Rig, opened, order, python
from cluster import Factory
from kept import KEPT, kept_python
from namespaced import ROOT, again, as_nobody, common, isolated, may_make_namespaces, space_of
from processes import wait_until
from running import Shell

from slurmfork.messages import WorkerView
from slurmfork.names import WorkerState

EXAMPLES = ROOT / "docs" / "examples"
GROUP = "46113"  # nobody else's
GROUPED, FORBIDDEN = "SLURMFORK_TEST_GROUPED", "SLURMFORK_TEST_FORBIDDEN"
BECOMING = "SLURMFORK_TEST_BECOMING"  # `id`, root's and set-uid
OVERFLOW = Path("/proc/sys/kernel/overflowuid").read_text().strip()  # whose files are that are nobody's
PY_SPY = "py-spy==0.4.3"
OVER = (WorkerState.EXITED, WorkerState.FAILED)
HAVE = {"bwrap": "bubblewrap", "gdb": "gdb"}  # programs, and Debian's packages that have them

pytestmark = [
    pytest.mark.skipif(not may_make_namespaces(), reason="no PID namespaces for this user on this machine"),
    pytest.mark.timeout(300),
]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with opened(tmp_path) as rig:
        await isolated(rig)
        yield rig


@pytest.fixture(scope="session")
def py_spy() -> str:
    return str(Path(kept_python("py-spy", [PY_SPY])).with_name("py-spy"))


def program(name: str) -> str:
    """One of Debian's programs, which root installs where it is not."""
    if not shutil.which(name) and os.geteuid() == 0 and shutil.which("apt-get"):
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", HAVE[name]]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not here, and only root can install it")
    return found


async def says(rig: Rig, *command: str, cwd: str = "/") -> str:
    """What a worker writes that has to end well."""
    await rig.start(order("w/0", list(command), cwd=cwd))
    view = await ended(rig)
    assert view.state is WorkerState.EXITED, rig.log("w/0")
    return rig.log("w/0")


async def ended(rig: Rig) -> WorkerView:
    """PyTorch's imports alone take half a minute where much else goes on."""
    for _ in range(8):
        with contextlib.suppress(AssertionError):
            return await rig.view("w/0", lambda view: view.state in OVER, "it to end")
    raise AssertionError(f"it has not ended: {rig.log('w/0')}")


# --- PyTorch -----------------------------------------------------------------------------------------------


def test_pytorch_trains_on_two_nodes(local: Shell, torch_python: str) -> None:
    """DistributedDataParallel over gloo, four workers in two namespaces."""
    command = json.dumps([torch_python, str(EXAMPLES / "ddp.py")])
    options = ["--set", f"roles.trainer.command={command}", "--set", "isolation=namespace", "--backend", "local"]
    run_id = local.submit(EXAMPLES / "ddp.yaml", *options)
    done = local.call("wait", run_id, timeout=240)
    log = (local.root / run_id / "logs" / "trainer-0.log").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log}{local.logs(run_id)}"
    assert [node["guarantee"] for node in local.status(run_id)["nodes"]] == ["namespace"] * 2
    assert "world 4 final" in log


LOADER = """
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

def fill(tensor, number): tensor[number] = number + 1

if __name__ == "__main__":
    data = TensorDataset(torch.arange(64).float())
    loader = DataLoader(data, batch_size=8, num_workers=2, persistent_workers=True)
    print(sum(float(batch[0].sum()) for _ in range(2) for batch in loader))
    for strategy in ("file_descriptor", "file_system"):
        mp.set_sharing_strategy(strategy)
        tensor = torch.zeros(2).share_memory_()
        children = [mp.get_context(method).Process(target=fill, args=(tensor, number))
                    for number, method in enumerate(("fork", "spawn"))]
        for child in children: child.start()
        for child in children: child.join()
        print(strategy, [child.exitcode for child in children], tensor.tolist())
"""


async def test_loaders_and_tensors_in_shared_memory(rig: Rig, tmp_path: Path, torch_python: str) -> None:
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    said = await says(rig, torch_python, str(script))
    shared = [f"{strategy} [0, 0] [1.0, 2.0]" for strategy in ("file_descriptor", "file_system")]
    assert said.splitlines() == [f"{2 * sum(range(64)):.1f}", *shared]


# --- debuggers, and other namespaces -----------------------------------------------------------------------

BUSY = (
    "def wait_for_a_debugger():\n    while True: sum(range(1000))\nprint('here', flush=True)\nwait_for_a_debugger()\n"
)
FROM_WITHIN = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
command = [word.replace("PID", str(child.pid)) for word in sys.argv[2:]]
done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
print(child.pid, done.returncode, done.stdout, flush=True)
child.kill()
"""
GDB = ["-nx", "-batch", "-p", "PID", "-ex", "bt 1"]


async def test_gdb_from_within(rig: Rig) -> None:
    said = await says(rig, *python(FROM_WITHIN, BUSY, program("gdb"), *GDB))
    assert "#0 " in said, said


async def test_py_spy_from_within(rig: Rig, py_spy: str) -> None:
    said = await says(rig, *python(FROM_WITHIN, BUSY, py_spy, "dump", "--pid", "PID"))
    assert "wait_for_a_debugger" in said, said


async def test_debuggers_from_outside(rig: Rig, py_spy: str) -> None:
    """By the PID of the node."""
    gdb = program("gdb")
    [view] = await rig.start(order("w/0", [sys.executable, "-c", BUSY]))
    await rig.printed("w/0")
    for command in ([gdb, *GDB], [py_spy, "dump", "--pid", "PID"]):
        words = [word.replace("PID", str(view.pid)) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert ("#0 " if command[0] == gdb else "wait_for_a_debugger") in done.stdout, done.stdout + done.stderr


async def test_a_container_in_there(rig: Rig) -> None:
    """bubblewrap makes user, PID and mount namespaces of its own below ours, with a /proc of its own."""
    sandbox = ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--unshare-all", "--die-with-parent"]
    said = await says(rig, program("bwrap"), *sandbox, "sh", "-c", "echo $$; ls /proc | grep -c '^[0-9]*$'; id -u")
    pid, seen, uid = map(int, said.split())
    assert (pid < 10, seen < 6, uid) == (True, True, os.geteuid())


# --- files, groups, limits ---------------------------------------------------------------------------------


async def test_files_are_the_users_own(rig: Rig, tmp_path: Path) -> None:
    made = tmp_path / "made"
    script = f"import os; open({str(made)!r}, 'w').close(); os.chmod({str(made)!r}, 0o640)\n"
    script += f"os.chown({str(made)!r}, os.getuid(), os.getgid())"
    await says(rig, *python(script))
    found = made.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (os.geteuid(), os.getegid(), 0o640)


@pytest.mark.skipif(
    GROUPED not in os.environ, reason="as a user with a supplementary group: test_all_of_this_as_another"
)
async def test_what_a_supplementary_group_may_read(rig: Rig) -> None:
    script = (
        "import os, sys; print(open(sys.argv[1]).read())\ntry: open(sys.argv[2])\nexcept PermissionError: print('no')"
    )
    assert (await says(rig, *python(script, os.environ[GROUPED], os.environ[FORBIDDEN]))).split() == ["shared", "no"]


OTHERS = """
import os, subprocess, sys
becoming, made, group = sys.argv[1:]
print(subprocess.check_output([becoming, "-u"], text=True).strip(), os.stat("/").st_uid)
open(made, "w").close()
try: os.chown(made, -1, int(group))
except OSError as error: print("refused", os.strerror(error.errno))
"""


@pytest.mark.skipif(BECOMING not in os.environ, reason="as a user who is not root: test_all_of_this_as_another")
async def test_there_is_no_other_user(rig: Rig, tmp_path: Path) -> None:
    """A set-uid program stays its caller's, files of others are nobody's, and of no group but the user's can any be."""
    becoming = os.environ[BECOMING]
    assert subprocess.check_output([becoming, "-u"], text=True).strip() == "0", "set-uid has no effect here at all"
    said = await says(rig, *python(OTHERS, becoming, str(tmp_path / "made"), GROUP))
    assert said.splitlines() == [f"{os.geteuid()} {OVERFLOW}", "refused Invalid argument"]


LIMITS = "import json, resource; print(json.dumps([resource.getrlimit(number) for number in range(16)]))"


async def test_limits_are_as_outside(tmp_path: Path, rig: Rig) -> None:
    said = json.loads(await says(rig, *python(LIMITS)))
    (tmp_path / "without").mkdir()
    async with opened(tmp_path / "without") as other:
        await other.agent(SLURMFORK_ISOLATION="none")
        assert json.loads(await says(other, *python(LIMITS))) == said


def core_pattern() -> str:
    return Path("/proc/sys/kernel/core_pattern").read_text().strip()


@pytest.mark.skipif("/" in core_pattern() or core_pattern().startswith("|"), reason="core dumps go elsewhere here")
async def test_a_core_dump(rig: Rig, tmp_path: Path) -> None:
    """Where the pattern is a name it is written to the working directory, by the user."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        pytest.skip("no core dumps are allowed here")
    where = tmp_path / "core-here"
    where.mkdir()
    script = "import os, resource as r; r.setrlimit(r.RLIMIT_CORE, (r.getrlimit(r.RLIMIT_CORE)[1],) * 2); os.abort()"
    await rig.start(order("w/0", python(script), cwd=str(where)))
    view = await ended(rig)
    assert "SIGABRT" in view.reason
    [core] = where.iterdir()
    assert (core.read_bytes()[:4], core.stat().st_uid) == (b"\x7fELF", os.geteuid())


# --- what is shared with the outside -----------------------------------------------------------------------

SHARES = """
import socket, sys, time
from multiprocessing import shared_memory
memory = shared_memory.SharedMemory(sys.argv[1])
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[2])
memory.buf[0] = memory.buf[0] + 1
door.sendall(b"done")
time.sleep(1000)
"""


async def test_memory_and_sockets_are_shared_with_processes_outside(rig: Rig, tmp_path: Path) -> None:
    memory = shared_memory.SharedMemory(create=True, size=1)
    door = socket.socket(socket.AF_UNIX)
    path = f"/tmp/slurmfork-inside-{os.getpid()}"  # a path of pytest's is too long
    try:
        memory.buf[0] = 41
        door.bind(path)
        door.listen()
        door.settimeout(PATIENCE)
        [view] = await rig.start(order("w/0", [sys.executable, "-c", SHARES, memory.name, path]))
        with door.accept()[0] as caller:
            caller.settimeout(PATIENCE)
            assert (caller.recv(4), memory.buf[0]) == (b"done", 42)
            peer = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        assert peer == (view.pid, os.geteuid(), os.getegid())  # who it is out here
    finally:
        door.close()
        Path(path).unlink(missing_ok=True)
        memory.close()
        memory.unlink()


# --- Slurm from within ------------------------------------------------------------------------------------

SPACE = "readlink /proc/self/ns/pid"
ASKS = f"srun --overlap -N1 -n1 sh -c 'id -u; {SPACE}' && {SPACE} && squeue -h -o %A"


@pytest.mark.slurm
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_srun_from_within(minicluster: Factory, user: str) -> None:
    """munge takes a worker for who it is, in a user namespace too. What srun starts is not in the PID namespace."""
    cluster = minicluster(nodes=2, gpus=2, proctrack="linuxproc")
    with common() as commons:
        shell = Shell(commons, {"SLURM_CONF": cluster.env["SLURM_CONF"], "HOME": str(commons)})
        if user == "nobody":
            shell.python = str(python_of_anybody(commons))
        text = json.dumps({"name": "asks", "isolation": "namespace", "roles": {"w": {"command": ["sh", "-c", ASKS]}}})
        run_id = shell.submit(shell.spec(text), "--backend", "slurm")
        done = shell.call("wait", run_id)
        log = shell.root / run_id / "logs" / "w-0.log"
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{log.read_text()}"
        uid, there, here, job = log.read_text().split()
        assert (int(uid), job) == (0 if user == "root" else 65534, shell.status(run_id)["job_id"])
        assert there == space_of(os.getpid()) != here
        shell.end()
        # The batch script still has its last words to write, after the run's end record.
        wait_until(lambda: not cluster.run(["squeue", "-h"]).stdout.split(), "the job to leave the queue")


def python_of_anybody(directory: Path) -> Path:
    """A Python with all that this one has, which runs as another user; root's own is out of reach for him."""
    base = Path("/usr/bin") / f"python3.{sys.version_info.minor}"
    if not base.exists():
        pytest.skip(f"there is no {base}, which another user could run")
    venv = directory / "venv"
    subprocess.run([base, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    [packages] = venv.glob("lib/python3.*/site-packages")
    (packages / "here.pth").write_text(f"{ROOT}\n{sysconfig.get_path('purelib')}\n")
    command = directory / "python-of-anybody"
    become = "exec setpriv --reuid nobody --regid nogroup --clear-groups"
    command.write_text(f'#!/bin/sh\n{become} {venv}/bin/python "$@"\n')
    command.chmod(0o755)
    return command


# --- as another user ---------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.timeout(600)
def test_all_of_this_as_another(torch_python: str, py_spy: str) -> None:
    for name in HAVE:
        program(name)
    kept = Path(torch_python).parents[2]
    with common() as commons:
        environment = {KEPT: str(kept)}
        for name, group, text in ((GROUPED, int(GROUP), "shared"), (FORBIDDEN, 0, "nobody's")):
            path = commons / name
            path.write_text(text)
            path.chmod(0o640)
            os.chown(path, 0, group)
            environment[name] = str(path)
        environment[BECOMING] = shutil.copy("/usr/bin/id", commons / "id")
        Path(environment[BECOMING]).chmod(0o4755)
        under = as_nobody(commons, kept, group=GROUP)
        again(under, commons, __file__, "-k", "not as_another and not srun", **environment)
