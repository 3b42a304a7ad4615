"""Sixty-four workers of one node end side by side: by a cancel, or when their agent is killed."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from agent_rig import python
from running import Shell

from slurmfork import killing, process

COUNT = 64
SECONDS = 2  # that each takes to leave, or is given; one after the other they would take 64 times as long
BUSY = 16 * SECONDS  # what is allowed for: the machine may be busy with other things
READY = (
    "import os, socket, time\n"
    "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n"
    "while True: time.sleep(1000)\n"
)
KINDS = {
    "leave": f"import signal\nsignal.signal(15, lambda *_: [time.sleep({SECONDS}), os._exit(0)])\n{READY}",
    "deaf": f"import signal\nsignal.signal(15, signal.SIG_IGN)\n{READY}",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["cancel", "agent-kill"])
def test_many_take_as_long_as_one(local: Shell, kind: str, end: str) -> None:
    grace = SECONDS if kind == "deaf" else 10 * BUSY  # who leaves by himself is not to be waited for any longer
    role = {
        "replicas": COUNT,
        "ready": {"notify": True},
        "stop": {"grace": grace},
        "command": python(KINDS[kind]),
    }
    spec = local.spec(json.dumps({"name": "many", "roles": {"w": role}}))
    run_id = local.ready(spec, "--backend", "local")
    workers = [one for view in local.ps(run_id) if (one := process.identify(view["pid"]))]
    assert len(workers) == COUNT
    agent = local.status(run_id)["nodes"][0]["agent_pid"]
    begun = time.monotonic()
    if end == "cancel":
        reply = local.json("cancel", run_id)
        assert (reply["survivors"], reply["unverified"]) == (0, [])
    else:
        os.kill(agent, signal.SIGKILL)
    assert killing.wait_gone(workers, 2 * BUSY) == []
    assert time.monotonic() - begun < BUSY
