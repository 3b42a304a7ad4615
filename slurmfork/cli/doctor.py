"""The verb `doctor`: has everything looked at that runs need here, and prints what was found."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence

import click

from slurmfork import backends, rundir
from slurmfork.backends.base import Check
from slurmfork.cli import output
from slurmfork.cli.options import verb
from slurmfork.doctor import machine, place
from slurmfork.errors import SlurmforkError

_INDENT = 24
_LEAST_WIDTH = 60


@verb("doctor", prints_data=True, examples=["slurmfork doctor", "slurmfork doctor --cluster big --json"])
@click.option(
    "--backend", "-b", type=click.Choice(["local", "slurm", "ray"]), help="What must work; default: what is here."
)
def doctor(backend: str | None, root: str | None, as_json: bool) -> int:
    """Check this machine, the shared directory and this cluster: what holds, what it means for runs, what to do.

    Exits with 0 if nothing prevents runs here, else with 1.
    """
    found = [*machine.checks(), *place.checks(rundir.root_of(root)), *_backend(backend)]
    if as_json:
        output.document({"ok": all(check.ok for check in found), "checks": found})
    else:
        _print(found)
    return 0 if all(check.ok for check in found) else 1


def _backend(wanted: str | None) -> list[Check]:
    here = shutil.which("sbatch") is not None
    if wanted == "ray":
        return _check("ray")
    if wanted == "local" or (wanted is None and not here):
        others = "not looked at" if here else "no sbatch here"
        detail = f"{others}; `--backend local` works without"
        return [Check(name="slurm", ok=True, detail=detail), *_check("local")]
    return _check("slurm")


def _check(name: str) -> list[Check]:
    try:
        return backends.get(name).check()
    except SlurmforkError as error:
        return [Check(name=name, ok=False, detail=str(error))]


def _print(found: Sequence[Check]) -> None:
    """A line for each, and below it what that means and what to do; wrapped only on a terminal."""
    width = max(_LEAST_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 0
    output.say(f"{'CHECK':<18}{'OK':<6}FOUND")
    for check in found:
        ok = f"{'yes' if check.ok else 'NO':<6}"
        lead = f"{check.name:<17} {ok if check.ok or not width else click.style(ok, fg='red', bold=True)}"
        lines = [line for text in (check.detail, check.means) if text for line in _wrapped(text, width)]
        lines += [f"{'-> ' if number == 0 else '   '}{line}" for number, line in enumerate(_wrapped(check.todo, width))]
        output.say(lead + (lines[0] if lines else ""))
        for line in lines[1:]:
            output.say(" " * _INDENT + line)
    wrong = [check.name for check in found if not check.ok]
    output.say(f"not in order: {', '.join(wrong)}" if wrong else "nothing here prevents runs")


def _wrapped(text: str, width: int) -> list[str]:
    text = output.one_line(text)
    return textwrap.wrap(text, width - _INDENT - 3) if width else [text] * bool(text)
