"""The local backend's launcher: what srun is on Slurm. Starts one guardian a node on this machine and waits.

``python -I .../backends/local_nodes.py --nodes N --gpus G``: node I is ``localI`` and is granted G of this
machine's devices. Passes SIGTERM on; ends with the worst exit status of its guardians.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # isolated mode leaves out every path of the user's, ours among them
    sys.path.append(__file__.rsplit("/", 3)[0])

from slurmfork import devices, names
from slurmfork.errors import PlanError

AGENT = Path(__file__).resolve().parent.parent / "agent" / "__main__.py"
DEVICES = "SLURMFORK_LOCAL_DEVICES"


def start(index: int, granted: str, run_dir: Path) -> subprocess.Popen[bytes]:
    """Start the guardian of one node, its output in the node's agent log."""
    node = f"local{index}"
    environment = {**os.environ, names.NODE: node, DEVICES: granted}
    log = os.open(run_dir / "agents" / f"{node}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-I", str(AGENT)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)


def main(arguments: list[str]) -> int:
    """Start the guardians, wait for all of them."""
    if len(arguments) != 4 or arguments[0] != "--nodes" or arguments[2] != "--gpus":
        print("usage: local_nodes --nodes N --gpus G", file=sys.stderr)
        return 2
    run_dir = Path(os.environ[names.RUN_DIR])
    try:
        granted = devices.of_this_process(int(arguments[1]), int(arguments[3]))
    except PlanError as error:
        print(f"slurmfork: {error}", file=sys.stderr)
        return error.exit_code
    guardians = [start(index, ",".join(own), run_dir) for index, own in enumerate(granted)]

    def pass_on(number: int, frame: object) -> None:
        for guardian in guardians:
            guardian.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    return max(_wait(guardian, f"local{index}") for index, guardian in _as_they_end(guardians))


def _as_they_end(guardians: list[subprocess.Popen[bytes]]) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    left = dict(enumerate(guardians))
    while left:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)  # reaped by its own object
        for index, guardian in list(left.items()):
            if ended is not None and guardian.pid == ended.si_pid:
                yield index, left.pop(index)


def _wait(guardian: subprocess.Popen[bytes], node: str) -> int:
    status = _status(guardian.wait())
    if status:
        print(f"slurmfork: the agent of {node} ended with {status}", file=sys.stderr, flush=True)
    return status


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
