"""The door: the table of verbs, `slurmfork --help`, and the edge where errors become a line.

Whatever goes wrong inside a verb leaves through ``main``: one line on stderr that says what to do, the exit
code of the error, and with ``--json`` one document on stdout. Nobody else ends the process. Imports nothing
that `--help` does not need.
"""

from __future__ import annotations

import os
import sys

from slurmfork import installation
from slurmfork.version import __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from click import UsageError

PROGRAM = "slurmfork"
INTERRUPTED = 130

# By section and verb: the module of this package that holds it, and what it does, in a line.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "Specs": {
        "init": ("specs", "Write a commented starter spec."),
        "validate": ("specs", "Check a spec; every mistake with its file and line."),
        "plan": ("specs", "Show which worker goes on which node, with which GPUs."),
        "render": ("specs", "Print the batch script that would be submitted."),
        "epilog": ("specs", "Print an epilog for Slurm, for who runs the cluster."),
    },
    "Runs": {
        "submit": ("submit", "Submit a spec."),
        "run": ("submit", "Submit, follow the logs, cancel on Ctrl-C."),
        "wait": ("submit", "Wait until a run is ready or done; exits with its status."),
        "fork": ("act", "Start workers beside those that run, on the same GPUs."),
        "stop": ("act", "Stop a role or one worker, and all that they started."),
        "cancel": ("act", "End runs, and verify that nothing is left."),
    },
    "Looking": {
        "status": ("look", "All runs, or one in detail."),
        "ps": ("look", "The workers of a run."),
        "logs": ("look", "What the workers write, one or all merged."),
    },
    "Clusters": {
        "cluster": ("group", "Reach clusters by SSH: add, list, test, trust, bootstrap."),
    },
    "Upkeep": {
        "clean": ("tidy", "End whatever is left of runs that are over."),
        "prune": ("tidy", "Remove the directories of old runs that are over."),
        "doctor": ("doctor", "Check this machine and its Slurm; says what to do."),
    },
}
# The verbs that are groups: the same for what is in them. The function in the module is called verb_name.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "cluster": {
        "add": ("cluster", "Write a profile."),
        "list": ("cluster", "Show the profiles."),
        "test": ("cluster", "Go to a cluster step by step; says what to do."),
        "trust": ("cluster", "Accept the host key of a cluster."),
        "bootstrap": ("bootstrap", "Put this version of slurmfork there."),
    },
}
VERBS: dict[str, tuple[str, str]] = {name: entry for section in SECTIONS.values() for name, entry in section.items()}

_PAGE = """\
Usage: slurmfork VERB [OPTIONS] [ARGUMENTS]

  A compose file for a Slurm allocation: roles of processes share its GPUs, more
  are forked beside them on demand, and nothing is left behind.

{verbs}

Options:
  --version   Show the version and exit.
  -h, --help  Show this page, or what a verb does: slurmfork VERB --help

RUN is a run id, the beginning of one, a Slurm job id, or `last`.
"""


def help_page() -> str:
    """What `slurmfork --help` prints."""
    width = max(map(len, VERBS))
    sections = []
    for title, entries in SECTIONS.items():
        lines = [f"  {name.ljust(width)}  {text}" for name, (_, text) in entries.items()]
        sections.append("\n".join([f"{title}:", *lines]))
    return _PAGE.format(verbs="\n\n".join(sections))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. No error leaves it, no traceback but by ``--debug``."""
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        from slurmfork.cli.group import cli

        cli.main(prog_name=PROGRAM)  # a shell asks for completions; exits
    installation.settle()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _invoke(given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except BaseException as error:
        return _explain(error, given[: given.index("--")] if "--" in given else given)


def _invoke(arguments: list[str]) -> int:
    if arguments in ([], ["-h"], ["--help"]):
        sys.stdout.write(help_page())
        return 0
    if arguments == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return 0
    import click

    from slurmfork.cli.group import cli

    if "slurmfork.cli.output" in sys.modules:  # not the first command of this process
        sys.modules["slurmfork.cli.output"].reset()
    try:
        with cli.make_context(PROGRAM, list(arguments)) as context:
            status = cli.invoke(context)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    return status if isinstance(status, int) else 0


def _forget_stdout() -> None:
    """Whoever read our output has left: nothing more may be written, not even at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _explain(error: BaseException, options: list[str]) -> int:
    """Print an error, a line on stderr and with ``--json`` a document on stdout; returns the exit status."""
    import click

    from slurmfork.cli import output

    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if "--debug" in options and not isinstance(error, click.ClickException):
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)
    lines, kind, status = _words(error)
    for line in lines:
        output.complain(line)
    if "--json" in options:
        output.error_document(error, "; ".join(lines), kind)
    return status


def _words(error: BaseException) -> tuple[list[str], str, int]:
    """(lines for people, kind for programs, exit status) of an error."""
    import click

    from slurmfork.cli import output
    from slurmfork.errors import SlurmforkError

    if isinstance(error, SlurmforkError):
        return str(error).splitlines() or [type(error).__name__], output.kind_of(error), error.exit_code
    if isinstance(error, click.UsageError):
        return [_usage(error)], "usage", 2
    if isinstance(error, click.ClickException):
        return [error.format_message()], "usage", error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return ["interrupted"], "interrupted", INTERRUPTED
    told = " ".join(str(error).split())
    return [f"fault: {type(error).__name__}: {told}; --debug shows where"], "fault", 1


def _usage(error: UsageError) -> str:
    message = error.format_message().rstrip(".")
    path = error.ctx.command_path if error.ctx else PROGRAM
    joint = "" if message.endswith("?") else ";"
    return f"{message[:1].lower()}{message[1:]}{joint} `{path} --help` tells more"
