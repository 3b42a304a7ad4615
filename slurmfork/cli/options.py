"""What the verbs share on the command line: the options that each of them has, and types of arguments.

Imports click and nothing of the package that costs time.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slurmfork import names

Function = Callable[..., "int | None"]
if TYPE_CHECKING:
    _Type = click.ParamType[Any]
else:
    _Type = click.ParamType  # generic only since click 8.4


class Verb(click.Command):
    """A command that ends its help with examples, printed as they are, and with --cluster is run over there."""

    examples: Sequence[str] = ()

    def invoke(self, ctx: click.Context) -> Any:
        cluster = ctx.params.pop("cluster", None)
        if cluster == "":
            raise click.BadParameter("the name of the cluster is empty", ctx, param_hint="--cluster")
        if cluster:
            from slurmfork.cli import elsewhere

            if self.name not in elsewhere.STAYING:
                return elsewhere.run(ctx, cluster)
            elsewhere.lay_defaults(ctx, cluster)
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(" " * formatter.current_indent + line + "\n")
        super().format_epilog(ctx, formatter)


def verb(
    name: str,
    *,
    prints_data: bool = False,
    uses_root: bool = True,
    goes_elsewhere: bool = True,
    examples: Sequence[str] = (),
) -> Callable[[Function], Verb]:
    """Make a function the command ``name``, with --root and --debug, and with --json where it prints data.

    Unless it says that it does not go elsewhere, it gets --cluster; with that, it is not the function that is called.
    The function gets ``root`` (None: the default place) and ``as_json``; what it returns is the exit status.
    """

    def decorate(function: Function) -> Verb:
        command = click.command(name, cls=Verb)(function)
        command.examples = examples
        if prints_data:
            command.params.append(
                click.Option(["--json", "as_json"], is_flag=True, help="One JSON document on stdout, nothing else.")
            )
        command.params.append(
            click.Option(
                ["--root"],
                metavar="DIR",
                type=click.Path(file_okay=False),
                expose_value=uses_root,
                help="Where run directories live; default $SLURMFORK_ROOT, else ~/.slurmfork/runs.",
            )
        )
        if goes_elsewhere:
            command.params.append(
                click.Option(
                    ["--cluster"],
                    metavar="NAME",
                    envvar=names.CLUSTER,
                    help="On that cluster, by SSH; default $SLURMFORK_CLUSTER, else here.",
                )
            )
        command.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show where an error came from.")
        )
        return command

    return decorate


class RunName(_Type):
    """A run, as people name it; what it means is found out later. Completes run ids."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value.strip():
            self.fail("the name of the run is empty", param, ctx)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        root = Path(ctx.params.get("root") or os.environ.get("SLURMFORK_ROOT") or "~/.slurmfork/runs").expanduser()
        try:
            found = sorted(
                entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False) and entry.name[0] != "."
            )
        except OSError:
            found = []
        return [CompletionItem(name) for name in [*found, "last"] if name.startswith(incomplete)]


class Seconds(_Type):
    """A duration in seconds: 90, 90s, 5m, 12h, 7d. ``unit`` refuses a bare number, whose unit is a guess."""

    name = "duration"
    _units = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}  # noqa: RUF012

    def __init__(self, *, unit: bool = False) -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)([smhdw]?)", value.strip())
        if match is None or (self._unit and not match[2]):
            self.fail(f"{value!r} is not a duration; write 7d, 12h or 30m", param, ctx)
        seconds = float(match[1]) * self._units[match[2] or "s"]
        assert math.isfinite(seconds)
        return seconds


class Assignment(_Type):
    """NAME=VALUE, for the environment."""

    name = "K=V"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, text


RUN = RunName()
SPEC = click.Path(dir_okay=False, path_type=Path)

spec_argument = click.argument("spec", metavar="SPEC", type=SPEC)
run_argument = click.argument("run", metavar="RUN", type=RUN)
backend_option = click.option(
    "--backend", "-b", type=click.Choice(["local", "slurm", "ray"]), help="In place of the spec's own backend."
)
set_option = click.option(
    "--set",
    "-s",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Override a value of the spec, e.g. roles.rollout.replicas=4. Can be repeated.",
)
code_option = click.option("--code", hidden=True, metavar="NAME", help="Code that was sent from elsewhere before.")
template_option = click.option(
    "--template",
    "-t",
    type=click.Path(dir_okay=False, exists=True, path_type=Path),
    help="A template of your own.",
)
