"""What is told of a cluster: to people, to programs, and to shells."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from mini.clients import node_states, search_path
from mini.kernels import address
from mini.processes import is_up, living
from mini.sites import foreign_commands, site_environment
from mini.ssh_files import hosts, known_hosts, ssh_config
from mini.ssh_keys import key_paths, keys_at, secret_paths
from mini.store import load
from mini.users import Users, homes
from mini.words import Cluster, Failed, Place, Record, Shape


def headline(cluster: Cluster, record: Record) -> str:
    shape, name = record.shape, "" if cluster.name == "default" else f" --name {cluster.name}"
    things = f"{shape.nodes} node{'s' * (shape.nodes != 1)} of {shape.gpus} GPU{'s' * (shape.gpus != 1)}"
    extra = ", accounting" if shape.accounting else ""
    extra += ", kernels of their own" if shape.kernels else ""
    extra += f", site {shape.site}" if shape.site else ""
    script = Path(sys.argv[0]).absolute()
    with contextlib.suppress(ValueError):
        script = script.relative_to(Path.cwd())
    return (
        f"{things}, Slurm {record.version}, proctrack/{shape.proctrack}{extra}: "
        f'eval "$({shlex.quote(str(script))} env{name})"'
        + (f"\n  ssh -F {ssh_config(cluster)} login" if shape.ssh else "")
    )


def status(cluster: Cluster, as_json: bool) -> int:
    record = load(cluster)
    state = "up" if is_up(record) else "damaged" if cluster.home.exists() else "down"
    nodes = node_states(cluster) if record and record.ready else {}
    daemons = living(record) if record else {}
    if as_json:
        print(json.dumps(description(cluster, record, state, nodes=nodes), indent=1))
    else:
        shown = f", {headline(cluster, record)}" if record and state == "up" else ""
        print(f"{cluster.name}: {state}{shown}")
        for title, alive in daemons.items():
            print(f"  {title:12} {'running' if alive else 'gone':8} {nodes.get(title, '')}".rstrip())
    return 0 if state == "up" else 1


def description(cluster: Cluster, record: Record | None, state: str, *, nodes: dict[str, str]) -> dict[str, object]:
    alive = living(record) if record else {}
    daemons = record.daemons if record else {}
    return {
        "name": cluster.name,
        "state": state,
        "directory": str(cluster.home),
        "conf": str(cluster.conf),
        "shared": str(cluster.shared) if record and record.shape.kernels else None,
        "version": record.version if record else None,
        "shape": asdict(record.shape) if record else None,
        "daemons": [{"name": t, "pid": p.pid, "running": alive[t]} for t, p in daemons.items()],
        "nodes": [
            {"name": name, "address": address_of(record, name, i), "state": nodes.get(name, "unknown")}
            for i, name in enumerate(cluster.nodes(record.shape), 1)
        ]
        if record
        else [],
        "ssh": ssh(cluster, record.shape, Place(record.block)) if record and record.shape.ssh else None,
    }


def address_of(record: Record, name: str, index: int) -> str:
    return address(name) if record.shape.kernels else Place(record.block).address(index)


def ssh(cluster: Cluster, shape: Shape, place: Place) -> dict[str, object]:
    return {
        "config": str(ssh_config(cluster)),
        "known_hosts": str(known_hosts(cluster)),
        "hosts": [
            {"name": host.name, "role": host.role, "address": host.address, "port": host.port, "daemon": host.title}
            for host in hosts(cluster, shape, place)
        ],
        "users": asdict(Users.of(place)),
        "homes": str(homes(cluster)),
        "keys": {name: str(path) for name, path in key_paths(cluster).items()},
        "secrets": {name: str(path) for name, path in secret_paths(cluster).items()},
    }


def print_env(cluster: Cluster) -> None:
    record = load(cluster)
    if not record or not is_up(record):
        raise Failed(f"{cluster.name} is not up; first: {Path(sys.argv[0]).name} up --name {cluster.name}")
    for name, value in variables(cluster, record).items():
        print(f"export {name}={shlex.quote(value)}")


def variables(cluster: Cluster, record: Record) -> dict[str, str]:
    """SLURM_CONF is Slurm's; the rest, there with --ssh, is for people and tests."""
    found = {"SLURM_CONF": str(cluster.conf)}
    if record.shape.rooted or foreign_commands(record.shape):
        found["PATH"] = search_path(cluster)
    found |= site_environment(record.shape)
    if record.shape.ssh:
        place, prefix = Place(record.block), "MINICLUSTER_SSH_"
        found[f"{prefix}CONFIG"] = str(ssh_config(cluster))
        found[f"{prefix}KNOWN_HOSTS"] = str(known_hosts(cluster))
        found[f"{prefix}KEYS"] = str(keys_at(cluster))
        for host in hosts(cluster, record.shape, place)[:2]:
            found[f"{prefix}{host.name.upper()}"] = f"{host.address}:{host.port}"
        found |= {f"{prefix}{role.upper()}": name for role, name in asdict(Users.of(place)).items()}
    return found
