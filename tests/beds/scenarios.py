"""What happens to runs on a bed: each scenario makes one, does something to it, and holds it to how it must end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from beds.bed import Bed
from beds.specs import forked, main_spec, restarting_spec, spec

LEASE_S = 90  # until a node that is cut off for ever has ended its own workers


@dataclass(frozen=True)
class Scenario:
    """``kernels``: only where nodes are kernels of their own. ``act`` takes the bed and the mark of its processes."""

    name: str
    about: str
    act: Callable[[Bed, int], None]
    kernels: bool = False


REGISTRY: dict[str, Scenario] = {}
Act = Callable[[Bed, int], None]


def scenario(name: str, about: str, *, kernels: bool = False) -> Callable[[Act], Act]:
    def put(act: Act) -> Act:
        REGISTRY[name] = Scenario(name, about, act, kernels)
        return act

    return put


def state_of(bed: Bed, run_id: str, *wanted: str, said: str = "") -> None:
    """``said``: by the command before, of a state that was to be this one already."""
    status = bed.status(run_id)
    found = f"{status['state']} ({status['scheduler']}), not {' or '.join(wanted)}: {status['reason']}"
    assert status["state"] in wanted, found + (f"; before: {said}" if said else "")


def gone(bed: Bed, mark: int) -> None:
    bed.until(lambda: bed.everywhere(mark) == {}, "every process of the run to be gone")


def cancelled(bed: Bed, run_id: str) -> None:
    done = bed.json("cancel", run_id)
    assert done["survivors"] == 0, done["details"]
    assert done["state"] == "cancelled", done
    assert not done["unverified"], f"not asked: {done['unverified']}"


@scenario("cancel", "submit, ready, cancel")
def cancel(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    bed.until(lambda: bed.everywhere(mark), "workers to be seen")
    cancelled(bed, run_id)
    state_of(bed, run_id, "cancelled")


@scenario("fork", "fork, fork of a fork, stop of both, cancel")
def fork(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    first = forked(bed, run_id, "second", "first")
    deeper = forked(bed, run_id, "third", "second")
    assert (len(first), len(deeper)) == (2, 2), f"{first} {deeper}"
    for role in ("third", "second"):
        stopped = bed.json("stop", run_id, role)
        assert (len(stopped["stopped"]), stopped["survivors"]) == (2, 0), stopped
    cancelled(bed, run_id)


@scenario("scancel", "a bare scancel, with forks")
def scancel(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark))
    forked(bed, run_id, "second", "first")
    bed.slurm("scancel", bed.status(run_id)["job_id"])
    assert bed.ended(run_id).returncode == 1
    state_of(bed, run_id, "cancelled")
    gone(bed, mark)


@scenario("time-limit", "a job that reaches its time limit of a minute")
def time_limit(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark, time="00:01:00"))
    assert bed.ended(run_id).returncode == 1
    state_of(bed, run_id, "timeout")
    gone(bed, mark)


@scenario("requeue", "scontrol requeue of a job that asks for it: the run starts again, and is cancelled")
def requeue(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark, requeue=True))
    before = {view["pid"] for view in bed.ps(run_id, "first")}
    bed.slurm("scontrol", "requeue", bed.status(run_id)["job_id"])
    bed.until(lambda: bed.status(run_id)["state"] != "ready", "the run to be told as not ready")
    bed.until(lambda: bed.status(run_id)["state"] == "ready", "the run to be ready again")
    after = {view["pid"] for view in bed.ps(run_id, "first")}
    assert after, "no workers after the requeue"
    assert bed.kernels or not before & after, f"a worker of before is told as one of now: {before & after}"
    cancelled(bed, run_id)


@scenario("preempt", "another job takes the nodes")
def preempt(bed: Bed, mark: int) -> None:
    run_id = bed.ready(spec(mark, partition="spare"))
    whole = ["--nodes=2", "--exclusive", "--time=5", "--partition=gpu", "--parsable", "--output=/dev/null"]
    other = bed.slurm("sbatch", *whole, "--wrap", "sleep 1").strip()
    try:
        done = bed.ended(run_id)
        assert done.returncode == 1
        state_of(bed, run_id, "preempted", said=done.stdout + done.stderr)
        gone(bed, mark)
    finally:
        bed.slurm("scancel", other.split(";")[0], check=False)


@scenario("restart", "a worker that fails is started again")
def restart(bed: Bed, mark: int) -> None:
    run_id = bed.ready(restarting_spec(mark))
    victim = next(view for view in bed.ps(run_id, "first") if view["worker"] == "first/0")
    bed.command(["kill", "-9", str(victim["pid"])], node=victim["node"] if bed.kernels else "")
    bed.until(lambda: _restarts(bed, run_id) == 1, "the worker to be started again")
    assert bed.everywhere(mark), "nothing runs after the restart"
    cancelled(bed, run_id)


def _restarts(bed: Bed, run_id: str) -> int:
    return sum(view["restarts"] for view in bed.ps(run_id, "first") if view["state"] in ("running", "ready"))


@scenario("end-0", "the main role ends by itself with 0")
def end_well(bed: Bed, mark: int) -> None:
    run_id = bed.submit(main_spec(mark, 0))
    done = bed.ended(run_id)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    state_of(bed, run_id, "completed")
    gone(bed, mark)


@scenario("end-3", "the main role ends by itself with 3")
def end_badly(bed: Bed, mark: int) -> None:
    run_id = bed.submit(main_spec(mark, 3))
    done = bed.ended(run_id)
    assert done.returncode == 3, f"{done.returncode} {done.stderr}"
    state_of(bed, run_id, "failed")
    gone(bed, mark)
