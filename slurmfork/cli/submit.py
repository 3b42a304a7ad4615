"""Verbs that start runs and wait for them: submit, run, wait."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from slurmfork import hints, submission
from slurmfork.cli import attached, failure, output, progress
from slurmfork.cli.options import (
    Seconds,
    backend_option,
    code_option,
    run_argument,
    set_option,
    spec_argument,
    template_option,
    verb,
)
from slurmfork.names import RunState
from slurmfork.observe import RunStatus
from slurmfork.run import Run

INTERRUPTED = 130


@verb(
    "submit",
    prints_data=True,
    examples=[
        "slurmfork submit grpo.yaml",
        "slurmfork submit grpo.yaml --backend local --set roles.rollout.replicas=2 --wait",
        "RUN=$(slurmfork submit grpo.yaml --json | jq -r .run_id)",
    ],
)
@spec_argument
@backend_option
@set_option
@template_option
@code_option
@click.option(
    "--wait",
    "-w",
    is_flag=True,
    help="Return when the run is ready; if it fails before, exit with its status.",
)
def submit(
    spec: Path,
    backend: str | None,
    overrides: Sequence[str],
    template: Path | None,
    code: str | None,
    wait: bool,
    root: str | None,
    as_json: bool,
) -> int:
    """Submit SPEC, and print the run's id.

    On a terminal, shows progress until the run is ready; Ctrl-C lets go of it and leaves the run alone.
    """
    run = submission.submit(spec, backend=backend, root=root, template=template, overrides=overrides, code=code)
    for text in run.notes:
        output.complain(text)
    if not as_json:
        output.say(attached.name_line(run))
    if not wait and (as_json or not sys.stdout.isatty()):
        if as_json:
            output.document(_submitted(run, None))
        else:
            _next_steps(run, ready=False)
        return 0
    try:
        with progress.face(quiet=as_json) as face:
            status = progress.until(run, "ready", face)
    except KeyboardInterrupt:
        output.complain(f"let go of {run.run_id}, which goes on; {hints.command('status', run.run_id)} shows how")
        if as_json:
            output.document(_submitted(run, None))
        return INTERRUPTED if wait else 0
    return _is_up(run, status, as_json=as_json)


def _is_up(run: Run, status: RunStatus, *, as_json: bool) -> int:
    if as_json:
        output.document(_submitted(run, status))
    elif status.state is RunState.READY:
        for line in progress.notes(status):
            output.complain(line)
        output.say(f"{run.run_id} is ready: {progress.counts(status)}")
        _next_steps(run, ready=True)
    elif status.state is RunState.COMPLETED:
        output.say(f"{run.run_id} is completed already")
    failure.explain(run, status)
    return failure.exit_status(status)


def _submitted(run: Run, status: RunStatus | None) -> dict[str, Any]:
    found: dict[str, Any] = {"state": RunState.PENDING} if status is None else msgspec.to_builtins(status)
    own = {"run_id": run.run_id, "name": run.record.name, "backend": run.record.backend, "job_id": run.job_id}
    return {**found, **own, "run_dir": str(run.rundir.path), "notes": run.notes}


def _next_steps(run: Run, *, ready: bool) -> None:
    first = ("ps", run.run_id) if ready else ("wait", run.run_id, "--for", "ready")
    steps = (first, ("logs", run.run_id, "-f"), ("cancel", run.run_id))
    output.say("next: " + ", ".join(hints.command(*step) for step in steps))


@verb(
    "run",
    examples=["slurmfork run grpo.yaml", "slurmfork run grpo.yaml -b local --set nodes=2"],
)
@spec_argument
@backend_option
@set_option
@template_option
@code_option
@click.option("--no-prefix", is_flag=True, help="Without the worker's name before each line.")
def run(
    spec: Path,
    backend: str | None,
    overrides: Sequence[str],
    template: Path | None,
    code: str | None,
    no_prefix: bool,
    root: str | None,
) -> int:
    """Submit SPEC and follow its logs to the end; exits with the run's own status.

    Ctrl-C cancels the run, and waits until nothing of it is left; a second Ctrl-C does not wait. To close the
    terminal, or the pipe that it prints to, cancels the run too.
    """

    def start() -> Run:
        return submission.submit(spec, backend=backend, root=root, template=template, overrides=overrides, code=code)

    return attached.submit_and_follow(start, prefix=not no_prefix)


@verb(
    "wait",
    prints_data=True,
    examples=["slurmfork wait last", "slurmfork wait grpo-x7k2mq --for ready --timeout 10m"],
)
@run_argument
@click.option("--for", "goal", type=click.Choice(["ready", "done"]), default="done", help="What to wait for; done.")
@click.option("--timeout", "-t", type=Seconds(), metavar="S", help="Seconds (or 10m, 2h); then exit 124.")
def wait(run: str, goal: str, timeout: float | None, root: str | None, as_json: bool) -> int:
    """Wait until RUN is done, or ready.

    Exits with the run's own status: 0 if it completed (or is ready), its exit status if it failed, 1 if it
    ended otherwise; 124 if the wait took longer than --timeout, which leaves the run alone.
    """
    found = Run.load(run, root)
    with progress.face(quiet=as_json) as face:
        status = progress.until(found, goal, face, timeout)
    if as_json:
        output.document(status)
    elif failure.exit_status(status) == 0:
        output.say(f"{found.run_id} is {status.state}")
    failure.explain(found, status)
    return failure.exit_status(status)
