"""What happens to nodes: power, network, clock, disk, and Slurm's own daemons, on kernels of their own."""

from __future__ import annotations

import time
from functools import partial

from beds.bed import PATIENCE_S, Bed
from beds.scenarios import LEASE_S, cancelled, gone, scenario, state_of
from beds.specs import forked, spec

SLURMD_TIMEOUT_S = 30  # the bed's
NAMED_S = SLURMD_TIMEOUT_S + 15
MARGIN_S = 60  # for machines that have much else to do; the seconds themselves are in the results
LOST = ("node_fail", "failed")


def told(bed: Bed, run_id: str, node: str) -> bool:
    """Status says that this node does not answer, and of no other that it does not."""
    silent = [one["node"] for one in bed.status(run_id)["nodes"] if one["silent"]]
    assert set(silent) <= {node}, f"told as silent: {silent}"
    return node in silent


def lose(bed: Bed, mark: int, run_id: str, node: str) -> None:
    """The node is told, the run ends, and the nodes that are up are clean."""
    took = bed.until(lambda: told(bed, run_id, node), f"status to name {node}", NAMED_S)
    bed.measured.append(f"`status` named {node} after {took:.0f} s (SlurmdTimeout is {SLURMD_TIMEOUT_S} s)")
    assert bed.ended(run_id).returncode not in (0, 124)
    state_of(bed, run_id, *LOST)
    reason = bed.status(run_id)["reason"]
    assert node in reason, f"the reason does not name {node}: {reason}"


def back(bed: Bed, mark: int, node: str) -> None:
    """With power again the node serves, and nothing of the run is there."""
    bed.deed(node, "start")
    bed.until(lambda: _serves(bed, node), f"{node} to be back")
    assert bed.seen(mark, node) == []


@scenario("power-cut", "a compute node loses power, with workers and forks on it; then it is back", kernels=True)
def power_cut(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    forked(bed, run_id, "second", "first")
    bed.deed("n2", "kill")
    lose(bed, mark, run_id, "n2")
    gone(bed, mark)
    back(bed, mark, "n2")


@scenario("power-cut-in-fork", "the same while a fork is under way", kernels=True)
def power_cut_in_fork(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.deed("n2", "freeze")  # so that the fork cannot be over
    fork = bed.start("fork", "--json", run_id, "second", "--target", "first")
    try:
        bed.deed("n2", "kill")
        lose(bed, mark, run_id, "n2")
        fork.wait(timeout=120)
        assert fork.returncode != 0, "a fork that could not be is told as done"
    finally:
        fork.kill()
        fork.wait()
    gone(bed, mark)
    back(bed, mark, "n2")


@scenario("cut-10s", "a node is off the network for 10 s", kernels=True)
def short_cut(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.deed("n2", "cut")
    time.sleep(10)  # the scenario itself
    bed.deed("n2", "join")
    took = bed.until(lambda: not told(bed, run_id, "n2"), "the agent of n2 to answer again")
    bed.measured.append(f"the agent answered {took:.0f} s after its node was back")
    assert len(forked(bed, run_id, "second", "first")) == 2
    state_of(bed, run_id, "ready")
    cancelled(bed, run_id)


@scenario("cut-for-ever", "a node is off the network and stays so: it ends its own workers", kernels=True)
def long_cut(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    forked(bed, run_id, "second", "first")
    bed.deed("n2", "cut")
    lose(bed, mark, run_id, "n2")
    bed.until(lambda: not bed.seen(mark, "n1"), "the other node's processes to be gone")
    left = "the cut-off node to have ended its own workers"
    took = bed.until(lambda: not bed.seen(mark, "n2"), left, LEASE_S + MARGIN_S)
    bed.measured.append(f"the cut-off node had no worker left {took:.0f} s after the others were gone")


@scenario("freeze", "a node hangs, until Slurm has given it up, and then goes on", kernels=True)
def freeze(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.deed("n2", "freeze")
    lose(bed, mark, run_id, "n2")
    bed.until(lambda: not bed.seen(mark, "n1"), "the other node's processes to be gone")
    bed.deed("n2", "thaw")
    gone(bed, mark)


@scenario("clock", "a node's clock is 90 s ahead, which Slurm bears: the run starts, and says so", kernels=True)
def clock(bed: Bed, mark: int) -> None:
    bed.deed("n2", "clock", "90")
    run_id = bed.ready(spec(mark))
    notes = {one["node"]: " ".join(one["notes"]) for one in bed.status(run_id)["nodes"]}
    assert "ahead of the head's" in notes["n2"], notes
    assert "clock" not in notes["n1"], notes
    assert len(forked(bed, run_id, "second", "first")) == 2
    cancelled(bed, run_id)


@scenario("clock-hour", "a node's clock is an hour ahead, so that Slurm has no word of it: the run ends", kernels=True)
def clock_hour(bed: Bed, mark: int) -> None:
    bed.deed("n2", "clock", "3600")
    run_id = bed.submit(spec(mark))
    assert bed.ended(run_id).returncode not in (0, 124)
    state_of(bed, run_id, *LOST)
    bed.measured.append(bed.status(run_id)["reason"])
    gone(bed, mark)


@scenario("clock-jump", "a node's clock goes on by an hour while the run is up", kernels=True)
def clock_jump(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.deed("n2", "clock", "3600")
    assert len(forked(bed, run_id, "second", "first")) == 2
    state_of(bed, run_id, "ready")
    cancelled(bed, run_id)


@scenario("tmp-full", "a node's /tmp is full: the run starts all the same, or says why not", kernels=True)
def tmp_full(bed: Bed, mark: int) -> None:
    bed.deed("n2", "fill-tmp")
    run_id = bed.submit(spec(mark))
    bed.call("wait", run_id, "--for", "ready", "--timeout", "200")
    status = bed.status(run_id)
    if status["state"] == "ready":
        cancelled(bed, run_id)
    else:
        assert status["state"] == "failed", status
        assert "space" in status["reason"], status["reason"]
        assert "n2" in status["reason"], status["reason"]


@scenario("slurmd-killed", "slurmd of a node is killed, and started again", kernels=True)
def slurmd_killed(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.on("n2", "pkill -9 -x slurmd; slurmd -N n2")
    assert len(forked(bed, run_id, "second", "first")) == 2
    cancelled(bed, run_id)


@scenario("stepd-killed", "every slurmstepd of a node is killed", kernels=True)
def stepd_killed(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.on("n2", "pkill -9 -x slurmstepd")
    bed.call("cancel", run_id)
    gone(bed, mark)
    bed.until(lambda: bed.status(run_id)["state"] in ("cancelled", *LOST), "the run to have ended")


@scenario("controller-restart", "slurmctld is killed in mid-run, and started again", kernels=True)
def controller_restart(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.on("login", "pkill -9 -x slurmctld")
    state_of(bed, run_id, "ready")
    assert len(forked(bed, run_id, "second", "first")) == 2
    bed.on("login", "slurmctld")
    bed.until(lambda: "mix" in bed.slurm("sinfo", "-h", "-o", "%T", check=False), "slurmctld to know of the job")
    state_of(bed, run_id, "ready")
    cancelled(bed, run_id)


def mend(bed: Bed) -> None:
    """Every node with power, on the network, awake, with room in /tmp and the right time; also after a scenario that
    failed."""
    for node in ["login", *bed.nodes]:
        if node in bed.down_nodes:
            bed.deed(node, "start")
        bed.deed(node, "thaw")
        bed.deed(node, "join")
    for node in ["login", *bed.nodes]:
        bed.until(partial(_right, bed, node), f"{node} to answer")
        if node != "login":
            bed.on(node, "pkill -HUP -x slurmd", check=False)  # registers, which a node given up does seldom by itself
    # Slurm itself takes minutes until it has given up on a step of which a node is lost.
    bed.until(lambda: set(_states(bed)) == {"idle"}, "all nodes to be idle", 2 * PATIENCE_S)


def _states(bed: Bed, *words: str) -> list[str]:
    return bed.slurm("sinfo", "-h", "-o", "%T", *words, check=False).split()


def _serves(bed: Bed, node: str) -> bool:
    """Slurm has its word; it may still be completing the job that is lost, on the other nodes."""
    found = _states(bed, "-n", node)
    return bool(found) and not any("down" in word or "*" in word for word in found)


def _right(bed: Bed, node: str) -> bool:
    """A new file of the shared directory has this machine's time, by whichever clock it was made."""
    line = f"rm -f /tmp/full; : >/shared/now-{node}; date -s @$(stat -c %Y /shared/now-{node})"
    return bed.on(node, f"rm -f /shared/now-{node}; {line}", check=False)
