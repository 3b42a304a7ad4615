"""Verbs that look and change nothing: status, ps, logs."""

from __future__ import annotations

import difflib
from pathlib import Path

import click

from slurmfork import hints
from slurmfork import logs as logfiles
from slurmfork.cli import failure, logview, output, probed, progress
from slurmfork.cli.options import RUN, run_argument, verb
from slurmfork.errors import UsageError
from slurmfork.messages import NodeView, WorkerView
from slurmfork.names import split_target
from slurmfork.observe import RunStatus
from slurmfork.run import QUICK, Run, statuses

CHANGES = 5
OLD = 30.0  # seconds after which a scheduler's word is told with its age

# --- status


@verb(
    "status",
    prints_data=True,
    examples=[
        "slurmfork status",
        "slurmfork status last",
        "slurmfork status last --probe",
        "slurmfork status --json | jq -r '.runs[].state'",
    ],
)
@click.argument("run", metavar="[RUN]", type=RUN, required=False)
@probed.options
def status(
    run: str | None, probe: bool, via: str | None, timeout: float | None, root: str | None, as_json: bool
) -> int | None:
    """Show all runs, the newest last; or RUN in detail: its nodes, what failed, and how fresh that is.

    With --probe the nodes of RUN are looked at too: whether the processes that their journals name are alive.
    The exit status is 1 if a node could not be asked, and 0 if all were, whatever they said.
    """
    if probe:
        if run is None:
            raise UsageError("--probe looks at the nodes of one run: name it")
        return _probe(Run.load(run, root), via, timeout, as_json)
    probed.refuse_without_probe(via, timeout)
    if run is not None:
        found = Run.load(run, root)
        [(one, workers)] = statuses([found], QUICK)
        if as_json:
            output.document({"runs": [one]})
        else:
            _detail(one, workers)
        return None
    every = [one for one, _ in statuses(Run.all(root), QUICK)]
    if as_json:
        output.document({"runs": every})
    elif not every:
        output.complain("there are no runs yet; `slurmfork init` writes a spec to begin with")
    else:
        titles = ["RUN", "NAME", "BACKEND", "JOB", "STATE", "NODES", "WORKERS", "AGE", "REASON"]
        output.table(titles, [_row(one) for one in every])
    return None


def _probe(run: Run, via: str | None, timeout: float | None, as_json: bool) -> int:
    found, one, workers = probed.look(run, via, timeout)
    if as_json:
        output.document({"runs": [one], "probe": found})
        return probed.conclude(found)
    _detail(one, workers)
    if found.nodes:
        output.say()
        probed.node_table(found)
        output.say()
        probed.summary(found, one)
        probed.tell_strays(found)
    return probed.conclude(found)


def _row(one: RunStatus) -> list[object]:
    nodes = f"{sum(node.joined for node in one.nodes)}/{len(one.nodes)}" if one.nodes else "-"
    age = output.since(one.submitted)
    reason = _stale(one) if one.reason else ("" if one.over else _freshness(one))
    return [one.run_id, one.name, one.backend, one.job_id or "-", one.state, nodes, _up(one), age, reason]


def _up(one: RunStatus) -> str:
    if not one.workers.total:
        return "-"
    failed = f", {one.workers.failed} failed" if one.workers.failed else ""
    if one.over:
        return f"{one.workers.total}{failed}"
    return f"{one.workers.ready + one.workers.running}/{one.workers.total}{failed}"


def _freshness(one: RunStatus) -> str:
    """Whose word a status is and how old; empty where it is the head's own, just now."""
    if one.source == "saved":
        return f"as its head saw it {output.span(one.age)} ago"
    if one.source == "scheduler":
        ago = f" {output.span(one.age)} ago" if one.age > OLD else ""
        return f"the scheduler's word{ago}" + (f": {one.scheduler}" if one.scheduler else "")
    return "nothing heard of it yet" if one.source == "submit" else ""


def _stale(one: RunStatus) -> str:
    """The reason, and its age where the scheduler has not answered for a while."""
    old = one.source == "scheduler" and one.age > OLD and not one.over
    return one.reason + (f" (as of {output.span(one.age)} ago)" if old else "")


def _detail(one: RunStatus, workers: list[WorkerView]) -> None:
    facts = [
        ("run", one.run_id),
        ("state", _state(one)),
        ("reason", output.one_line(one.reason)),
        ("exit status", one.exit_status),
        ("job", f"{one.backend} {one.job_id or '(none)'}"),
        ("submitted", f"{output.since(one.submitted)} ago"),
        ("attempt", one.attempt + 1 if one.attempt else ""),
        ("workers", _counts(one)),
        ("left behind", _left(one)),
        ("code", _code(one)),
        ("directory", one.run_dir),
    ]
    for title, fact in facts:
        if fact not in ("", None):
            output.say(f"{title + ':':<12} {fact}")
    if one.nodes:
        output.say()
        output.table(["NODE", "JOINED", "GUARANTEE", "GPUS", "CPUS", "ADDRESS"], [_node(n) for n in one.nodes])
        for line in progress.notes(one):
            output.say(line)
    if failed := failure.failed_workers(workers):
        output.say()
        for view in failed[: failure.SHOWN]:
            output.say(failure.worker_line(view))
            for line in view.log_tail.splitlines()[-failure.TAIL :]:
                output.say(f"  | {line}")
        if len(failed) > failure.SHOWN:
            output.say(f"and {len(failed) - failure.SHOWN} more; {hints.command('ps', one.run_id)}")


def _state(one: RunStatus) -> str:
    if one.ended:
        return f"{one.state}, {output.since(one.ended)} ago"
    if told := _freshness(one):
        return f"{one.state} ({told})"
    return f"{one.state}, for {output.since(one.ready)}" if one.state == "ready" and one.ready else str(one.state)


def _counts(one: RunStatus) -> str:
    seen = one.workers
    if not seen.total:
        return ""
    failed = f", {seen.failed} failed" if seen.failed else ""
    return f"{seen.total}{failed}" if one.over else f"{seen.ready + seen.running} of {seen.total} up{failed}"


def _left(one: RunStatus) -> str:
    """What is known of processes that outlived the run."""
    words = []
    if one.survivors:
        words.append(f"{output.plural(one.survivors, 'process')}")
    if one.unverified:
        words.append(f"could not ask {', '.join(one.unverified)}")
    if words:
        return "; ".join(words) + f"; {hints.command('clean', one.run_id)}"
    return "nothing" if one.survivors == 0 else ""


def _code(one: RunStatus) -> str:
    """Where the code that was sent along came from, and what git said of it."""
    if one.code is None:
        return ""
    source, known = f"{one.code.host}:{one.code.source}", one.code.git
    if known is None:
        return source
    where = f"{known.commit[:12] if known.commit else 'no commit yet'}{f' on {known.branch}' if known.branch else ''}"
    if not known.dirty:
        return f"{source} at {where}"
    count = len(known.changed) + known.more
    names = ", ".join(change[3:] for change in known.changed[:CHANGES])
    return f"{source} at {where}, and {output.plural(count, 'change')}: {names}{', ...' if count > CHANGES else ''}"


def _node(node: NodeView) -> list[object]:
    gpus = output.numbers(node.devices) or "-"
    joined = "SILENT" if node.silent else "yes" if node.joined else "NO"
    return [node.node, joined, node.guarantee, gpus, node.cpus, node.address]


# --- ps


@verb(
    "ps",
    prints_data=True,
    examples=[
        "slurmfork ps last",
        "slurmfork ps last --role eval",
        "slurmfork ps last --json | jq '.workers[].pid'",
        "slurmfork ps last --probe",
        "slurmfork ps last --probe --json | jq -e '.probe | .differences + .unrecorded == []'",
    ],
)
@run_argument
@click.option("--role", "-r", help="Only the workers of this role.")
@probed.options
def ps(
    run: str, role: str | None, probe: bool, via: str | None, timeout: float | None, root: str | None, as_json: bool
) -> int | None:
    """Show every worker that RUN has or had, the forked ones too.

    With --probe the nodes are looked at themselves, and PROBE says what became of the process that the node's
    journal names last for the worker: alive, gone, not ours (its PID is another process's), or unknown (why is
    said). Head and agents need not live; where they do, and say otherwise, that is told. The exit status is 1 if a
    node could not be asked, and 0 if all were, whatever they said.
    """
    found = Run.load(run, root)
    if probe:
        return _ps_probe(found, role, via, timeout, as_json)
    probed.refuse_without_probe(via, timeout)
    workers = found.workers()
    if role is not None:
        workers = [view for view in workers if view.role == _known_role(role, workers, found)]
    if as_json:
        output.document({"workers": workers})
    elif workers:
        worker_table(workers)
    else:
        output.complain(f"{found.run_id} has no workers yet; it is {found.status().state}")
    return None


def _ps_probe(run: Run, role: str | None, via: str | None, timeout: float | None, as_json: bool) -> int:
    found, one, workers = probed.look(run, via, timeout)
    if role is not None:
        found = probed.of_role(found, _known_role(role, workers, run))
        workers = [view for view in workers if view.role == role]
    if as_json:
        output.document({"workers": workers, "probe": found})
        return probed.conclude(found)
    if not workers and not found.nodes:
        output.complain(f"{run.run_id} has no workers yet; it is {one.state}")
        return 0
    output.table(probed.WORKER_TITLES, probed.worker_rows(found, workers))
    output.say()
    probed.summary(found, one)
    return probed.conclude(found)


def _known_role(role: str, workers: list[WorkerView], run: Run) -> str:
    roles = sorted({view.role for view in workers} | set(run.spec().roles))
    if role not in roles:
        raise UsageError(f"{run.run_id} has no role {role!r}; it has {', '.join(roles)}")
    return role


def worker_table(workers: list[WorkerView]) -> None:
    """Print a table of workers."""
    titles = [
        "WORKER",
        "NODE",
        "PID",
        "STATE",
        "GPUS",
        "PORTS",
        "TARGET",
        "RESTARTS",
        "EXIT",
        "AGE",
        "REASON",
    ]
    output.table(titles, [_worker_row(view) for view in workers])


def _worker_row(view: WorkerView) -> list[object]:
    dash = "-"
    return [
        view.worker,
        view.node or dash,
        view.pid or dash,
        view.state,
        output.numbers(view.gpus) or dash,
        ",".join(map(str, view.ports)) or dash,
        view.target or dash,
        view.restarts,
        dash if view.exit_status is None else view.exit_status,
        _age(view) or dash,
        view.reason,
    ]


def _age(view: WorkerView) -> str:
    if view.started and view.ended:
        return output.span(view.ended - view.started)
    return output.since(view.started)


# --- logs


@verb(
    "logs",
    examples=[
        "slurmfork logs last -f              all workers, as they write",
        "slurmfork logs last rollout -n 20   the last 20 lines of each worker of a role",
        "slurmfork logs last rollout/3       one log, as it is",
        "slurmfork logs last batch           what the batch script and the head said",
        "slurmfork logs last agent:node1     what the agent on a node said",
    ],
)
@run_argument
@click.argument("which", metavar="[WHICH]", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on as the logs grow, until the run is over.")
@click.option("--lines", "-n", "last", type=click.IntRange(0), metavar="N", help="Only the last N lines of each log.")
@click.option("--no-prefix", is_flag=True, help="Without the worker's name before each line.")
def logs(run: str, which: str | None, follow: bool, last: int | None, no_prefix: bool, root: str | None) -> None:
    """Print what the workers of RUN wrote to stdout and stderr.

    WHICH is a worker (rollout/3), whose log is printed as it is; a role; batch; or agent:NODE. Without it the
    logs of all workers are printed, with the worker's name before each line.
    """
    found = Run.load(run, root)
    path, role = _which(found, which)
    if path is not None:
        if not path.exists() and not (follow and not found.status().over):
            raise UsageError(f"{found.run_id} has no log of {which}{_nearest(found, which or '')}")
        logview.raw(found, path, last=last, follow=follow)
        return
    if follow and not logfiles.sources(found.rundir, role):
        _say_what_is_awaited(found)
    lines = logview.merged(found, role, last=last, follow=follow, prefix=not no_prefix)
    if not lines and last != 0:
        whose = f"no worker of {role}" if role else f"no worker of {found.run_id}"
        batch = hints.command("logs", found.run_id, "batch")
        output.complain(f"{whose} has written anything; {batch} has the batch script's")


def _which(run: Run, which: str | None) -> tuple[Path | None, str | None]:
    """(the file to print as it is, the role whose logs to merge); neither: all."""
    if which is None:
        return None, None
    if which == "batch" and not logfiles.sources(run.rundir, which):
        return run.rundir.batch_log, None
    kind, colon, node = which.partition(":")
    if colon and kind == "agent" and "/" not in node and node not in ("", ".", ".."):
        return run.rundir.agent_log(node), None
    try:
        role, index = split_target(which)
    except ValueError:
        raise UsageError(f"{which!r} is not a worker (role/index), a role, batch, or agent:NODE") from None
    if index is not None:
        return run.rundir.worker_log(role, index), None
    if not logfiles.sources(run.rundir, role):
        _known_role(role, run.workers(), run)
    return None, role


def _nearest(run: Run, which: str) -> str:
    there = [source.label for source in logfiles.sources(run.rundir)]
    there += [f"agent:{path.stem}" for path in sorted(run.rundir.agents.glob("*.log"))]
    near = difflib.get_close_matches(which, there, n=3, cutoff=0.3)
    return f"; there is {', '.join(near)}" if near else " yet"


def _say_what_is_awaited(run: Run) -> None:
    seen = run.status()
    why = progress.waiting_for(seen)
    if not seen.over:
        output.complain(f"{run.run_id} is {seen.state}{f': {why}' if why else ''}; waiting for the first line")
