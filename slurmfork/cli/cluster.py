"""Cluster: profiles of clusters that are reached by SSH, and whether the way to one is good.

`cluster trust` is the only place that accepts a host key, and only one whose fingerprint a person has confirmed, or
given on the command line. `cluster test` changes nothing anywhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from slurmfork import clusters
from slurmfork.backends.base import Check
from slurmfork.cli import output
from slurmfork.cli.options import verb
from slurmfork.errors import SlurmforkError, TransportError, UsageError

if TYPE_CHECKING:
    from slurmfork.remote.sshconfig import Settings
    from slurmfork.remote.transport import Transport
    from slurmfork.remote.trust import ShownKey

# What is told on the way, in this order, and again from "connection" on for each host behind a jump host.
_NEXT = {"": "address", "address": "connection", "connection": "host key", "host key": "login", "login": "connection"}
_MARK = "slurmfork-cluster-test"
# One command for all facts; what a noisy start-up file writes stands before the mark.
_PROBE = (
    f'echo {_MARK}; case "$1" in /*) p=$1;; *) p=$HOME/$1;; esac; '
    'for c in "$p" python3 python3.14 python3.13 python3.12 python3.11 python3.10; do '
    '[ -n "$c" ] && v=$("$c" -c "import sys; print(*sys.version_info[:3])" 2>/dev/null) && echo "python $v $c"; done; '
    's=$(sbatch --version 2>/dev/null) && echo "sbatch $s"; '
    f'f=$("$p" -m slurmfork --version 2>/dev/null) && echo "slurmfork $f"; '
    "exit 0"
)
_LEAST = (3, 10)


class ClusterName(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """The name of a profile; completes them."""

    name = "cluster"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        try:
            names = sorted(clusters.read())
        except SlurmforkError:
            names = []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


name_argument = click.argument("name", metavar="NAME", type=ClusterName())


def _setting(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not OPTION=VALUE", ctx, param)
        found[key] = int(value) if value.isdecimal() and str(int(value)) == value else value
    return found


@verb(
    "add",
    goes_elsewhere=False,
    examples=[
        "slurmfork cluster add big --host login.big.example.org --user jo --slurm partition=gpu",
        "slurmfork cluster add codes --host login.codes.example.org --ssh openssh",
    ],
)
@click.argument("name", metavar="NAME")
@click.option("--host", required=True, help="The login node: a name or address, or what ~/.ssh/config calls it.")
@click.option("--user", help="Who logs in there.")
@click.option("--port", type=click.IntRange(1, 65535), help="The port of its sshd.")
@click.option("--identity-file", metavar="FILE", help="The private key; no other is offered then.")
@click.option("--proxy-jump", metavar="HOST[,HOST]", help="Through these hosts, as with ssh -J.")
@click.option(
    "--ssh",
    type=click.Choice(["paramiko", "openssh"]),
    default="paramiko",
    help="openssh: only over a connection that you open yourself, for logins with one-time codes.",
)
@click.option("--python", metavar="PATH", help="The Python over there that has slurmfork.")
@click.option(
    "--slurm",
    metavar="OPTION=VALUE",
    multiple=True,
    callback=_setting,
    help="A default for what specs have under `slurm:`. Can be repeated.",
)
def cluster_add(name: str, root: str | None, slurm: dict[str, str | int], **values: Any) -> int:
    """Write a profile into config.toml; what is there stays as it is.

    What is left out is as ~/.ssh/config says. --root is the cluster's.
    """
    cluster = clusters.Cluster(root=root, slurm=dict(slurm), **values)

    def fail(key: str, message: str) -> Any:
        raise UsageError(f"{key + ': ' if key else ''}{message}")

    clusters.check(name, cluster, fail)
    file = clusters.add(name, cluster)
    output.say(f"{name} is in {file}; `slurmfork cluster test {name}` goes there")
    return 0


@verb(
    "list",
    prints_data=True,
    uses_root=False,
    goes_elsewhere=False,
    examples=["slurmfork cluster list", "slurmfork cluster list --json"],
)
def cluster_list(as_json: bool) -> int:
    """Show the profiles in config.toml."""
    found = clusters.read()
    if as_json:
        rows = [{"name": name, **{key: getattr(each, key) for key in clusters.KEYS}} for name, each in found.items()]
        output.document({"file": str(clusters.config_file()), "clusters": rows})
    elif not found:
        output.say(f"no clusters in {clusters.config_file()}; `slurmfork cluster add NAME --host HOST` adds one")
    else:
        output.table(
            ["CLUSTER", "HOST", "SSH", "JUMP"], [[n, _login(c), c.ssh, c.proxy_jump] for n, c in found.items()]
        )
    return 0


def _login(cluster: clusters.Cluster) -> str:
    user = f"{cluster.user}@" if cluster.user else ""
    return f"{user}{cluster.host}" + (f":{cluster.port}" if cluster.port else "")


@verb(
    "test",
    goes_elsewhere=False,
    prints_data=True,
    uses_root=False,
    examples=["slurmfork cluster test big", "slurmfork cluster test big --json"],
)
@name_argument
def cluster_test(name: str, as_json: bool) -> int:
    """Go to a cluster step by step, and look at what is needed there; says what to do.

    Exits with 0 if everything is as it should be, else with 1.
    """
    cluster = clusters.find(name)
    checks: list[Check] = []

    def note(step: str, detail: str, ok: bool = True) -> None:
        checks.append(Check(name=step, ok=ok, detail=detail))
        if not as_json:
            output.say(f"{'ok' if ok else 'NO':3}  {step:10}  {output.one_line(detail)}")

    transport = clusters.transport_of(name, cluster, tell=note)
    try:
        _go(transport, cluster, note, checks)
    except (SlurmforkError, TimeoutError) as error:
        note(_step_after(transport, checks), str(error) or f"{name} did not answer in time", False)
    finally:
        transport.close()
    if as_json:
        output.document({"cluster": name, "ok": all(check.ok for check in checks), "checks": checks})
    return 0 if all(check.ok for check in checks) else 1


def _step_after(transport: Transport, checks: list[Check]) -> str:
    """The step that failed: the one after those that were made."""
    from slurmfork.remote.openssh import OpenSshTransport

    if isinstance(transport, OpenSshTransport):
        return "connection"
    last = checks[-1].name if checks else ""
    return _NEXT.get(last, "commands")


def _go(transport: Transport, cluster: clusters.Cluster, note: Any, checks: list[Check]) -> None:
    from slurmfork.remote.local import LocalTransport
    from slurmfork.remote.transport import run

    done = run(transport, ["sh", "-c", _PROBE, "sh", clusters.python_there(cluster)[-1]], timeout=30)
    if isinstance(transport, LocalTransport):
        note("connection", f"{cluster.host} is this machine: no SSH is needed")
    elif not checks:
        note("connection", "shared, and yours")
    before, mark, facts = done.output.decode(errors="replace").partition(f"{_MARK}\n")
    if not mark:
        raise TransportError(f"commands do not run there: {done.words or f'exit status {done.status}'}")
    noise = "; ".join(filter(None, [output.one_line(before), done.words]))
    note("shell", f"its start-up files write: {noise[:100]}" if noise else "quiet")
    for check in _facts(facts.splitlines(), transport.name):
        note(check.name, check.detail, check.ok)


def _facts(lines: list[str], name: str) -> list[Check]:
    pythons = [line.split(None, 4)[1:] for line in lines if line.startswith("python ")]
    good = next((p for p in pythons if (int(p[0]), int(p[1])) >= _LEAST), None)
    sbatch = next((line.split(None, 1)[1] for line in lines if line.startswith("sbatch ")), None)
    ours = next((line.split()[-1] for line in lines if line.startswith("slurmfork ")), None)
    return [_python(good, pythons), _slurm(sbatch), _slurmfork(ours, name)]


def _python(good: list[str] | None, all_of_them: list[list[str]]) -> Check:
    if good is not None:
        return Check(name="python", ok=True, detail=f"{'.'.join(good[:3])}, {good[3]}")
    found = f"only {'.'.join(all_of_them[0][:3])}" if all_of_them else "none"
    detail = f"{found} on PATH, 3.10 or later is needed: name one with `python` in the profile"
    return Check(name="python", ok=False, detail=detail)


def _slurm(version: str | None) -> Check:
    detail = version or "no sbatch on PATH: have it put there by a start-up file of the shell that is read by SSH, too"
    return Check(name="slurm", ok=version is not None, detail=detail)


def _slurmfork(version: str | None, name: str) -> Check:
    from slurmfork.version import __version__

    if version is None:
        return Check(name="slurmfork", ok=False, detail=f"not there yet: `slurmfork cluster bootstrap {name}`")
    if version != __version__:
        detail = f"{version} there, {__version__} here: `slurmfork cluster bootstrap {name}`"
        return Check(name="slurmfork", ok=False, detail=detail)
    return Check(name="slurmfork", ok=True, detail=version)


@verb(
    "trust",
    goes_elsewhere=False,
    uses_root=False,
    examples=["slurmfork cluster trust big", "slurmfork cluster trust big --fingerprint SHA256:..."],
)
@name_argument
@click.option(
    "--fingerprint", metavar="SHA256:...", help="Accept the key of this fingerprint, and no other; asks nothing."
)
def cluster_trust(name: str, fingerprint: str | None) -> int:
    """Accept the host key of a cluster that is not known yet, into ~/.ssh/known_hosts.

    Shows its fingerprint and asks, on a terminal. A key that has changed is not accepted.
    """
    from slurmfork.remote.ssh import SshTransport

    cluster = clusters.find(name)
    accepted: list[str] = []

    def accept(settings: Settings, key: ShownKey) -> bool:
        if not _confirmed(settings, key, fingerprint):
            return False
        _remember(settings, key)
        accepted.append(settings.lookup)
        return True

    transport = clusters.transport_of(name, cluster, accept=accept)
    if not isinstance(transport, SshTransport):
        raise UsageError(
            f"{name} needs no trust of ours: {'it is here' if clusters.is_here(cluster) else 'ssh checks'}"
        )
    try:
        transport.look_at_key()
    finally:
        transport.close()
    output.say(f"accepted: {', '.join(accepted)}" if accepted else f"the host key of {name} was known already")
    return 0


def _confirmed(settings: Settings, key: ShownKey, fingerprint: str | None) -> bool:
    from slurmfork.remote.terminal import Terminal

    if fingerprint is not None:
        if fingerprint != key.fingerprint:
            raise TransportError(f"{settings.lookup} shows {key.words}, not {fingerprint}: refused")
        return True
    terminal = Terminal()
    if not terminal.there:
        return False  # the refusal says what to do
    terminal.say(f"{settings.lookup} shows the host key {key.words}")
    answer = terminal.ask("Is this the fingerprint that its site publishes? (yes/no)", echo=True)
    if answer.strip().lower() != "yes":
        raise TransportError(f"the host key of {settings.lookup} was not accepted")
    return True


def _remember(settings: Settings, key: ShownKey) -> None:
    from slurmfork.remote.knownhosts import add

    if not settings.known_hosts:
        raise TransportError("~/.ssh/config names no UserKnownHostsFile to write the key to")
    add(settings.known_hosts[0], settings.lookup, key.kind, key.blob, hashed=settings.hash_names)
