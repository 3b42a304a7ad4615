"""Verbs about specs, which need no run: init, validate, plan, render."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slurmfork.cli import output
from slurmfork.cli.options import backend_option, set_option, spec_argument, template_option, verb
from slurmfork.errors import PlanError, RunDirError, SpecError, UsageError

if TYPE_CHECKING:
    from slurmfork.plan import Node, Placement, Request
    from slurmfork.spec import Spec


@verb(
    "init",
    goes_elsewhere=False,
    uses_root=False,
    examples=["slurmfork init", "slurmfork init grpo.yaml && slurmfork run grpo.yaml -b local"],
)
@click.argument("path", metavar="[PATH]", default="slurmfork.yaml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def init(path: Path, force: bool) -> None:
    """Write a commented starter spec to PATH (slurmfork.yaml), which runs as it is, even on a laptop."""
    from slurmfork.cli import starter

    if path.is_dir():
        path = path / "slurmfork.yaml"
    backend = "slurm" if shutil.which("sbatch") else "local"
    text = starter.text(str(path), _name_for(path), backend)
    try:
        with path.open("w" if force else "x") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists already; --force overwrites it") from None
    except OSError as error:
        raise RunDirError(f"cannot write {path}: {error.strerror}") from None
    output.say(f"{path} is written; `slurmfork run {path} -b local` tries it on this machine")


def _name_for(path: Path) -> str:
    from slurmfork.names import NAME_PATTERN

    return path.stem if NAME_PATTERN.fullmatch(path.stem) and path.stem != "slurmfork" else "hello"


@verb(
    "validate",
    prints_data=True,
    uses_root=False,
    examples=["slurmfork validate grpo.yaml", "slurmfork validate grpo.yaml --set nodes=4 --json"],
)
@spec_argument
@backend_option
@set_option
def validate(spec: Path, backend: str | None, overrides: Sequence[str], as_json: bool) -> int:
    """Check a spec: its fields, their values, and whether its roles fit on its nodes.

    Prints one line for each mistake, with file and line, and exits with 2 if there is one.
    """
    from slurmfork import plan as planning

    try:
        read = _read(spec, backend, overrides)
        asked = planning.request(read)
        placed = planning.plan(read, nodes_of(read, asked))
    except (SpecError, PlanError) as error:
        if not as_json:
            raise
        output.document({"ok": False, "errors": _problems(error, spec)})
        raise
    if as_json:
        output.document({"ok": True, "errors": []})
    else:
        on = output.plural(asked.nodes, "node")
        output.say(f"ok: {output.plural(len(read.roles), 'role')}, {output.plural(len(placed), 'worker')} on {on}")
    return 0


def _problems(error: SpecError | PlanError, spec: Path) -> list[dict[str, Any]]:
    if isinstance(error, SpecError):
        return output.problems(error)
    return [{"file": str(spec), "line": None, "path": "", "message": str(error)}]


@verb(
    "plan",
    prints_data=True,
    uses_root=False,
    examples=["slurmfork plan grpo.yaml", "slurmfork plan grpo.yaml --nodes 4 --gpus-per-node 8"],
)
@spec_argument
@click.option("--nodes", "-N", type=click.IntRange(1, 100_000), help="In place of the nodes that would be asked for.")
@click.option("--gpus-per-node", "-G", type=click.IntRange(0, 1024), help="In place of what would be asked for.")
@backend_option
@set_option
def plan(
    spec: Path,
    nodes: int | None,
    gpus_per_node: int | None,
    backend: str | None,
    overrides: Sequence[str],
    as_json: bool,
) -> None:
    """Show which worker would go on which node, with which GPUs. Needs no cluster: the nodes are imagined."""
    import msgspec

    from slurmfork import plan as planning

    read = _resized(_read(spec, backend, overrides), nodes, gpus_per_node)
    asked = planning.request(read)
    placed = planning.plan(read, nodes_of(read, asked))
    if as_json:
        output.document({"workers": [_row(p) for p in placed], "request": msgspec.to_builtins(asked)})
        return
    rows = [
        [p.worker, p.node, output.numbers(p.gpus) or "-", p.cpus or "-", p.rank, " ".join(p.targets) or "-"]
        for p in placed
    ]
    output.table(["WORKER", "NODE", "GPUS", "CPUS", "RANK", "BESIDE"], rows)


def nodes_of(spec: Spec, asked: Request) -> list[Node]:
    """Imagined nodes, node0 and so on, as many and as large as will be asked for."""
    from slurmfork.plan import Node

    limits = {"local": spec.local.cpus_per_node, "ray": spec.ray.cpus_per_node}
    cpus = limits.get(spec.backend, asked.cpus_per_node)
    return [Node(f"node{number}", asked.gpus_per_node, cpus) for number in range(asked.nodes)]


def _resized(spec: Spec, nodes: int | None, gpus: int | None) -> Spec:
    """The spec on other nodes than its own."""
    from msgspec.structs import replace

    if nodes is not None:
        spec = replace(spec, nodes=nodes)
    if gpus is None:
        return spec
    if spec.backend == "local":
        return replace(spec, local=replace(spec.local, gpus_per_node=gpus))
    if spec.backend == "ray":
        return replace(spec, ray=replace(spec.ray, gpus_per_node=gpus))
    return replace(spec, slurm={**spec.slurm, "gpus-per-node": gpus})


def _row(placed: Placement) -> dict[str, Any]:
    import msgspec

    row: dict[str, Any] = msgspec.to_builtins(placed)
    return row


@verb(
    "render",
    examples=["slurmfork render grpo.yaml", "slurmfork render grpo.yaml --template site.sh.j2 | less"],
)
@spec_argument
@backend_option
@set_option
@template_option
def render(spec: Path, backend: str | None, overrides: Sequence[str], template: Path | None, root: str | None) -> None:
    """Print the batch script that `submit` would hand to Slurm, for a run called NAME-xxxxxx."""
    from slurmfork import installation, rundir
    from slurmfork import plan as planning
    from slurmfork import render as rendering

    read = _read(spec, backend, overrides)
    run_id = f"{read.name}-xxxxxx"
    script = rendering.render(
        read,
        run_id=run_id,
        run_dir=rundir.root_of(root) / run_id,
        request=planning.request(read),
        python=installation.python(),
        package=Path(rundir.__file__).resolve().parent,
        template=template,
    )
    click.echo(script, nl=not script.endswith("\n"))


@verb("epilog", uses_root=False, examples=["slurmfork epilog > /etc/slurm/epilog.d/slurmfork.sh"])
def epilog() -> None:
    """Print an epilog for Slurm, for who runs the cluster: it ends what a run has left on a node.

    It names this installation, which the nodes have to see, and root has to be the only one to change.
    """
    from slurmfork import installation
    from slurmfork import render as rendering

    package = Path(rendering.__file__).resolve().parent
    click.echo(rendering.epilog(python=installation.python(), package=package), nl=False)


def _read(path: Path, backend: str | None, overrides: Sequence[str]) -> Spec:
    from slurmfork.spec import reader

    return reader.load(path, overrides=list(overrides), backend=backend)
