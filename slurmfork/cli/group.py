"""The group of all verbs, as click sees it: each verb's module is imported only when that verb is used."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import click

from slurmfork.cli.main import GROUPS, PROGRAM, VERBS, help_page
from slurmfork.version import __version__


class Verbs(click.Group):
    """Knows the names and one-line texts of the verbs without importing any of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in GROUPS:
            return Group(cmd_name)
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"slurmfork.cli.{VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS and not ctx.resilient_parsing:
            raise click.UsageError(_no_such_verb(args[0], VERBS), ctx)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(help_page())

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(name, help=text) for name, (_, text) in VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


class Group(click.Group):
    """A verb that is a group of others, each imported only when it is used."""

    def __init__(self, name: str) -> None:
        self._entries = GROUPS[name]
        super().__init__(name, help=VERBS[name][1], invoke_without_command=True, callback=self._page)

    def _page(self) -> None:
        context = click.get_current_context()
        if context.invoked_subcommand is None:
            click.echo(context.get_help())

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._entries:
            return None
        module = importlib.import_module(f"slurmfork.cli.{self._entries[cmd_name][0]}")
        command: click.Command = getattr(module, f"{self.name}_{cmd_name}")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self._entries and not ctx.resilient_parsing:
            raise click.UsageError(_no_such_verb(args[0], self._entries), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, text) for name, (_, text) in self._entries.items()])


def _no_such_verb(name: str, verbs: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(verbs), n=1)
    return f"there is no verb {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


@click.group(
    cls=Verbs,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """A compose file for a Slurm allocation."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
