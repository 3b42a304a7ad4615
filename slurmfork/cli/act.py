"""Verbs that change a run: fork, stop, cancel."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

import click

from slurmfork import hints
from slurmfork.cli import attached, failure, output
from slurmfork.cli.look import worker_table
from slurmfork.cli.options import RUN, Assignment, Seconds, run_argument, verb
from slurmfork.errors import Refused, SlurmforkError
from slurmfork.messages import CancelReply, StopReply, WorkerView
from slurmfork.run import Run

Outcome: TypeAlias = "CancelReply | SlurmforkError"
NOT_VERIFIED = "not verified"  # what the head puts before the reason why a worker's node could not be asked


class Interrupted(SlurmforkError):
    """Ctrl-C, where there is more to be said than that."""

    exit_code = 130
    kind = "interrupted"


@verb(
    "fork",
    prints_data=True,
    examples=[
        "slurmfork fork last eval",
        "slurmfork fork last eval --target rollout/3 --env STEP=400",
        "slurmfork fork last probe --target rollout -- nvidia-smi -L",
    ],
)
@run_argument
@click.argument("role", metavar="ROLE")
@click.argument("command", metavar="[-- CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.option("--target", "-T", metavar="ROLE[/I]", help="Beside whom; default: the target in the spec.")
@click.option("--count", "-c", type=click.IntRange(1, 1024), default=1, help="Children beside each target; 1.")
@click.option("--env", "-e", "env", type=Assignment(), multiple=True, help="For their environment. Can be repeated.")
@click.option("--timeout", "-t", type=Seconds(), metavar="S", help="Seconds in which they must be up, all of them.")
@click.option("--request-id", metavar="ID", help="Asked twice with the same ID, done once; for scripts that retry.")
def fork(
    run: str,
    role: str,
    command: Sequence[str],
    target: str | None,
    count: int,
    env: Sequence[tuple[str, str]],
    timeout: float | None,
    request_id: str | None,
    root: str | None,
    as_json: bool,
) -> int:
    """Start a child of ROLE beside each worker of its target, on the same GPUs; all of them, or none.

    Returns when they are up. ROLE is one of the spec's, or a new name, with --target and a command.
    """
    found = Run.load(run, root)
    try:
        children = found.fork(
            role,
            target=target,
            count=count,
            env=dict(env),
            command=command or None,
            timeout=timeout,
            request_id=request_id,
        )
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; the fork goes on: {hints.command('ps', found.run_id)} shows how") from None
    except Refused as error:
        if not isinstance(error.detail, list) or not error.detail:
            raise
        output.complain(str(error))
        failure.tell_workers([view for view in error.detail if isinstance(view, WorkerView)])
        if as_json:
            output.error_document(error, str(error), error.kind)
        return error.exit_code
    if as_json:
        output.document({"workers": children})
    else:
        worker_table(children)
    return 0


@verb(
    "stop",
    prints_data=True,
    examples=["slurmfork stop last eval", "slurmfork stop last rollout/3 --grace 30"],
)
@run_argument
@click.argument("target", metavar="ROLE[/I]")
@click.option("--grace", "-g", type=Seconds(), metavar="S", help="Seconds before SIGKILL; default: the role's own.")
def stop(run: str, target: str, grace: float | None, root: str | None, as_json: bool) -> int:
    """Stop a role or one worker, with everything that they started; returns when it is gone."""
    reply = Run.load(run, root).stop(target, grace=grace)
    if as_json:
        output.document({"stopped": reply.stopped, "survivors": reply.survivors, "results": reply.results})
    else:
        _tell_stopped(target, reply)
    left = [(result.worker, survivor) for result in reply.results for survivor in result.survivors]
    unsure = [worker for worker, survivor in left if survivor.startswith(NOT_VERIFIED)]
    for worker, survivor in left:
        output.aside(f"  {worker}: {survivor}" if worker in unsure else f"  still alive: {worker}: {survivor}")
    if alive := len(left) - len(unsure):
        output.complain(f"{output.plural(alive, 'process')} of {target} would not die, not even by SIGKILL")
    if unsure:
        output.complain(f"{output.plural(len(unsure), 'worker')} of {target} may still run; try again")
    return 1 if reply.survivors else 0


def _tell_stopped(target: str, reply: StopReply) -> None:
    if not reply.stopped and not reply.survivors:
        output.say(f"nothing of {target} was running")
    how = {result.worker: result for result in reply.results}
    for worker in reply.stopped:
        result = how.get(worker)
        if result is None:
            output.say(f"{worker}: stopped")
            continue
        killed = ", by SIGKILL" if result.killed else ""
        code = "" if result.exit_status is None else f", exit status {result.exit_status}"
        output.say(f"{worker}: stopped in {result.seconds:.1f}s{killed}{code}")


@verb("cancel", prints_data=True, examples=["slurmfork cancel last", "slurmfork cancel grpo-x7k2mq 4711"])
@click.argument("run", metavar="RUN...", type=RUN, nargs=-1, required=True)
def cancel(run: Sequence[str], root: str | None, as_json: bool) -> int:
    """End runs, wait until they are gone, and verify: counts what is left on every node.

    Exits with 1 if a process is left, or if there is a node that could not be asked, or a job not cancelled.
    """
    found = list({one.run_id: one for one in (Run.load(name, root) for name in run)}.values())
    outcomes = _cancel_all(found)
    if as_json:
        documents = [_document(one, outcome) for one, outcome in zip(found, outcomes, strict=True)]
        output.document(documents[0] if len(documents) == 1 else {"runs": documents})
    clean = [_tell(one, outcome, as_json=as_json) for one, outcome in zip(found, outcomes, strict=True)]
    return 0 if all(clean) else 1


def _cancel_all(found: Sequence[Run]) -> list[Outcome]:
    """Cancel all at once, as each takes the time that its workers need; what each of them came to."""
    outcomes: dict[str, Outcome] = {}

    def work(one: Run) -> None:
        try:
            outcomes[one.run_id] = one.cancel()
        except SlurmforkError as error:
            outcomes[one.run_id] = error

    if len(found) == 1:
        work(found[0])
    threads = [threading.Thread(target=work, args=(one,), daemon=True) for one in found[1:] and found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = SlurmforkError("the cancel broke off; repeat it")
    return [outcomes.get(one.run_id, lost) for one in found]


def _document(run: Run, outcome: Outcome) -> dict[str, object]:
    if isinstance(outcome, SlurmforkError):
        return {"run_id": run.run_id, "error": str(outcome), "kind": output.kind_of(outcome)}
    return {
        "run_id": run.run_id,
        "state": outcome.state,
        "survivors": outcome.survivors,
        "unverified": outcome.unverified,
        "details": outcome.details,
        "notes": outcome.notes,
    }


def _tell(run: Run, outcome: Outcome, *, as_json: bool) -> bool:
    """Say how the cancel of a run went; returns whether all of it did, and nothing can be left."""
    if isinstance(outcome, SlurmforkError):
        output.complain(f"{run.run_id}: {outcome}")
        return False
    if not as_json:
        output.say(attached.cancelled_line(run, outcome))
    for line in outcome.details:
        output.aside(f"  still alive: {line}")
    for note in outcome.notes:
        output.complain(f"{run.run_id}: {note}")
    if outcome.survivors:
        output.complain(f"{run.run_id}: {hints.command('clean', run.run_id)} tries again to end what is left")
    if outcome.unverified:
        nodes = ", ".join(outcome.unverified)
        clean = hints.command("clean", run.run_id)
        output.complain(f"{run.run_id}: could not ask {nodes}; run {clean} there to make sure")
    return not (outcome.survivors or outcome.unverified or outcome.notes)
