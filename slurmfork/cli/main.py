"""The door: the table of verbs, each imported only when it is used, and the one edge where errors become a line.

Whatever goes wrong inside a verb leaves through ``main``: one line on stderr that says what to do, the exit code
of the error, and with ``--json`` one document on stdout. Nobody else prints errors or ends the process.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from slurmfork.errors import SlurmforkError
from slurmfork.version import __version__

PROGRAM = "slurmfork"
INTERRUPTED = 130


class Entry(NamedTuple):
    """One verb: the module of this package that holds it, and what `slurmfork --help` says of it."""

    module: str
    summary: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Specs": {
        "init": Entry("specs", "Write a commented starter spec."),
        "validate": Entry("specs", "Check a spec; every mistake with its file and line."),
        "plan": Entry("specs", "Show which worker goes on which node, with which GPUs."),
        "render": Entry("specs", "Print the batch script that would be submitted."),
    },
    "Runs": {
        "submit": Entry("submit", "Submit a spec."),
        "run": Entry("submit", "Submit, follow the logs, cancel on Ctrl-C."),
        "wait": Entry("submit", "Wait until a run is ready or done; exits with its status."),
        "fork": Entry("act", "Start workers beside those that run, on the same GPUs."),
        "stop": Entry("act", "Stop a role or one worker, and all that they started."),
        "cancel": Entry("act", "End runs, and verify that nothing is left."),
    },
    "Looking": {
        "status": Entry("look", "All runs, or one in detail."),
        "ps": Entry("look", "The workers of a run."),
        "logs": Entry("look", "What the workers write, one or all merged."),
    },
    "Upkeep": {
        "clean": Entry("tidy", "End whatever is left of runs that are over."),
        "prune": Entry("tidy", "Remove the directories of old runs that are over."),
        "doctor": Entry("doctor", "Check this machine and its Slurm; says what to do."),
    },
}
VERBS: dict[str, Entry] = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Verbs(click.Group):
    """The group of all verbs; knows their names and one-line texts without importing any of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"slurmfork.cli.{VERBS[cmd_name].module}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS and not ctx.resilient_parsing:
            raise click.UsageError(_no_such_verb(args[0]), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                width = max(map(len, VERBS))
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=e.summary) for name, e in VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


def _no_such_verb(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, VERBS, n=1)
    return f"there is no verb {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="RUN is a run id, the beginning of one, a Slurm job id, or `last`. "
    "`slurmfork VERB --help` tells more about each.",
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """A compose file for a Slurm allocation: roles of processes on the same GPUs, forked on demand, nothing left
    behind."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. No error leaves it, and no traceback without ``--debug``."""
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        cli.main(prog_name=PROGRAM)  # a shell asks for completions; exits
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
    from slurmfork.cli import output

    output.reset()
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
    """Turn an error into a line on stderr, with ``--json`` also a document on stdout; returns the exit status."""
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
    if isinstance(error, SlurmforkError):
        from slurmfork.cli import output

        return str(error).splitlines() or [type(error).__name__], output.kind_of(error), error.exit_code
    if isinstance(error, click.UsageError):
        return [_usage(error)], "usage", 2
    if isinstance(error, click.ClickException):
        return [error.format_message()], "usage", error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return ["interrupted"], "interrupted", INTERRUPTED
    told = " ".join(str(error).split())
    return [f"fault: {type(error).__name__}: {told}; --debug shows where"], "fault", 1


def _usage(error: click.UsageError) -> str:
    message = error.format_message().rstrip(".")
    path = error.ctx.command_path if error.ctx else PROGRAM
    return f"{message[:1].lower()}{message[1:]}; `{path} --help` tells more"
