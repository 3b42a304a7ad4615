"""What a submission hands on, and what it keeps back."""

from __future__ import annotations

from running import Shell, environ_of
from test_silent_head import PAIR, head_pid


def test_a_secret_and_what_a_worker_is_told_of_itself_stay_out_of_the_batch_script(local: Shell) -> None:
    local.env |= {"MYSECRET": "x", "SLURMFORK_WORKER": "outer/3", "RANK": "3", "TMPDIR": str(local.directory)}
    run_id = local.ready(local.spec(PAIR + "    secrets: [MYSECRET]\n"), "--backend", "local")
    [node] = local.status(run_id)["nodes"]
    for pid in (int(local.status(run_id)["job_id"]), head_pid(local, run_id), node["agent_pid"]):
        assert not {"MYSECRET", "SLURMFORK_WORKER", "RANK", "TMPDIR"} & environ_of(pid).keys()
    seen = environ_of(local.ps(run_id)[0]["pid"])
    assert (seen["MYSECRET"], seen["RANK"]) == ("x", "0")
