"""What a submission hands on, and what it keeps back."""

from __future__ import annotations

import json
import os
import signal

from processes import wait_until
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


def test_a_run_whose_submitter_was_killed_is_cancelled_though_its_head_comes_late(local: Shell) -> None:
    """Nobody knows its job: the submitter was killed before it could write it down."""
    run_id = local.ready(local.spec(PAIR), "--backend", "local")
    directory = local.root / run_id
    record = json.loads((directory / "run.json").read_text())
    del record["job_id"]
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "local.json").unlink()
    (directory / "head.json").rename(directory / "later")
    cancel = local.start("cancel", run_id, "--json")
    wait_until(lambda: not (directory / "batch.sh").exists(), "the cancel to wait")
    (directory / "later").rename(directory / "head.json")
    output, words = cancel.communicate(timeout=60)
    assert json.loads(output)["survivors"] == 0, words
    wait_until(lambda: not local.left(run_id), "the run to be gone")


def test_no_secret_is_kept_for_a_next_attempt_where_nobody_queues_runs_again(local: Shell) -> None:
    local.env["MYSECRET"] = "x"
    run_id = local.ready(local.spec(PAIR + "    requeue: true\n    secrets: [MYSECRET]\n"), "--backend", "local")
    secrets = local.root / run_id / "credentials" / "secrets.json"
    assert secrets.exists()
    os.kill(int(local.status(run_id)["job_id"]), signal.SIGTERM)
    assert local.call("wait", run_id).returncode == 1
    assert not secrets.exists()
