"""`slurmfork cluster bootstrap`: puts slurmfork on a cluster, for a profile that knows the way there."""

from __future__ import annotations

import contextlib

import click

from slurmfork import clusters
from slurmfork.cli import output
from slurmfork.cli.options import verb
from slurmfork.spec.sizes import in_words


@verb(
    "bootstrap",
    prints_data=True,
    uses_root=False,
    goes_elsewhere=False,
    examples=[
        "slurmfork cluster bootstrap mycluster",
        "slurmfork cluster bootstrap mycluster --python /opt/python/3.12/bin/python3",
    ],
)
@click.argument("name", metavar="NAME")
@click.option("--python", metavar="PY", help="The Python over there; default the first on its PATH from 3.10 on.")
@click.option(
    "--fresh", is_flag=True, help="With the newest of all that it depends on, not with what was fetched before."
)
@click.option("--prune", is_flag=True, help="Remove installations that no run needs and nobody used for a day.")
def cluster_bootstrap(name: str, python: str | None, fresh: bool, prune: bool, as_json: bool) -> None:
    """Put this version of slurmfork on the cluster NAME, with all that it needs.

    Nothing has to be there but a Python; no network is needed there. Runs that are under way keep what they have.
    """
    from slurmfork.remote import bootstrap as doing

    say = (lambda line: None) if as_json else output.complain
    with contextlib.closing(clusters.transport_of(name, clusters.find(name))) as transport:
        done = doing.bootstrap(transport, python, fresh=fresh, prune=prune, say=say)
    if as_json:
        output.document(done._asdict())
        return
    if done.sent:
        what = f"has slurmfork {done.version} now, {in_words(done.sent)} were sent"
    elif done.switched:
        what = f"is switched to slurmfork {done.version}, which was there: nothing was sent"
    else:
        what = f"has slurmfork {done.version} already: nothing was sent"
    gone = f"; removed {', '.join(done.removed)}" if done.removed else ""
    output.say(f"{name} {what}{gone}")
