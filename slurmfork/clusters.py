"""Clusters: the profiles in config.toml that say how each is reached, and the transport to one.

    [clusters.NAME]
    host = "login.example.org"      # or a name that ~/.ssh/config knows; all other keys may be left out
    user, port, identity_file, proxy_jump, ssh ("paramiko" or "openssh"), root, python
    [clusters.NAME.slurm]           # what specs have under `slurm:`, unless they say otherwise
    partition = "gpu"

The file is $SLURMFORK_CONFIG, else slurmfork/config.toml in $XDG_CONFIG_HOME, else in ~/.config.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import msgspec

from slurmfork import account
from slurmfork.errors import ConfigError, one_line
from slurmfork.spec import sbatch

if TYPE_CHECKING:
    from slurmfork.remote.terminal import Terminal
    from slurmfork.remote.transport import Transport

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_.:\[][^\s\x00-\x1f\x7f]*")  # never an option of ssh
_TEXTS = ("identity_file", "root", "python")


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A profile. None: what ~/.ssh/config says, or the default."""

    host: str
    user: str | None = None
    port: int | None = None
    identity_file: str | None = None
    proxy_jump: str | None = None
    ssh: Literal["paramiko", "openssh"] = "paramiko"
    root: str | None = None
    python: str | None = None
    slurm: dict[str, str | int | float | bool] = {}


PYTHON_THERE = "~/.slurmfork/venv/bin/python"  # where `cluster bootstrap` puts one
KEYS = Cluster.__struct_fields__


def config_file() -> Path:
    """Where the profiles are."""
    named = os.environ.get("SLURMFORK_CONFIG")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CONFIG_HOME") or account.home() / ".config") / "slurmfork" / "config.toml"


def read(file: Path | None = None) -> dict[str, Cluster]:
    """All profiles; none where there is no file. Raises ConfigError in one line."""
    file = file or config_file()
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    return _profiles(text, file)


def find(name: str) -> Cluster:
    """One profile; raises ConfigError."""
    found = read()
    if name not in found:
        near = _near(name, found)
        hint = near or f"; `slurmfork cluster add {name if _NAME.fullmatch(name) else 'NAME'} --host HOST` adds one"
        raise ConfigError(f"there is no cluster {name!r} in {config_file()}{hint}")
    return found[name]


def add(name: str, cluster: Cluster) -> Path:
    """Append a profile to the file, whose text stays as it is; raises ConfigError."""
    from slurmfork.rundir import replace_file

    file = config_file()
    if name in read(file):
        raise ConfigError(f"there is a cluster {name!r} already: change it in {file}")
    try:
        before = file.read_text() if file.exists() else ""
        after = before + ("" if before.endswith("\n") or not before else "\n") + ("\n" if before else "")
        after += _toml(name, cluster)
        if _profiles(after, file).get(name) != cluster:
            raise ConfigError(
                f"cannot add to {file} as it is written: add these lines yourself: {_toml(name, cluster)}"
            )
        file = file.resolve()  # a link stays one
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(file, after.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    return file


def check(name: str, cluster: Cluster, fail: Callable[[str, str], NoReturn]) -> None:
    """Look at each value; ``fail`` gets the key and what is wrong with it."""
    if not _NAME.fullmatch(name):
        fail("", f"{name!r} is not a name for a cluster: letters, digits, - and _")
    for key in ("host", "user"):
        value = getattr(cluster, key)
        if value is not None and not _WORD.fullmatch(value):
            fail(key, f"{value!r} is not a name for SSH")
    for part in (cluster.proxy_jump or "none").split(","):
        if not _WORD.fullmatch(part.strip()):
            fail("proxy_jump", f"{part!r} is not [user@]host[:port]")
    if cluster.port is not None and not 1 <= cluster.port <= 65535:
        fail("port", f"{cluster.port} is not a port")
    for key in _TEXTS:
        value = getattr(cluster, key)
        if value is not None and (not value or not value.isprintable() or value.startswith("-")):
            fail(key, f"{value!r} is not a path")
    for option in cluster.slurm:
        if option not in sbatch.ALLOWED:
            why = sbatch.REFUSED.get(option)
            fail(f"slurm.{option}", why or f"sbatch has no such option{_near(option, sbatch.ALLOWED)}")


def transport_of(
    name: str,
    cluster: Cluster,
    *,
    terminal: Terminal | None = None,
    tell: Callable[[str, str], None] | None = None,
    accept: Callable[[Any, Any], bool] | None = None,
) -> Transport:
    """The way to a cluster's login node, which is opened at its first use; a cluster that is here needs no SSH."""
    if is_here(cluster):
        from slurmfork.remote.local import LocalTransport

        return LocalTransport(name)
    if cluster.ssh == "openssh":
        from slurmfork.remote.openssh import OpenSshTransport

        return OpenSshTransport(cluster.host, name=name, options=_ssh_options(cluster))
    from slurmfork.remote.lean import lean

    with lean():
        from slurmfork.remote.ssh import SshTransport

    listeners: dict[str, Any] = {"tell": tell, "accept": accept}
    return SshTransport(
        cluster.host,
        user=cluster.user,
        port=cluster.port,
        identity_file=cluster.identity_file,
        proxy_jump=cluster.proxy_jump,
        name=name,
        profile=name,
        terminal=terminal,
        **{key: listener for key, listener in listeners.items() if listener is not None},
    )


def is_here(cluster: Cluster) -> bool:
    """Whether the login node is this very machine, and the user this very one, so that no SSH is needed."""
    if cluster.port is not None or cluster.proxy_jump is not None:
        return False  # whoever names these wants to go through them
    from slurmfork.remote.places import is_this_machine

    return is_this_machine(cluster.host, cluster.user)


def python_there(cluster: Cluster) -> list[str]:
    """The Python that runs slurmfork on the login node, as the first words of a command.

    A path below the home directory is looked for there, wherever the login shell may have gone. A cluster that is
    here has this very slurmfork, where its profile names no other.
    """
    python = cluster.python or PYTHON_THERE
    if is_here(cluster):
        return [str(account.home() / Path(python).expanduser()) if cluster.python else sys.executable]
    if python.startswith("/"):
        return [python]
    return ["sh", "-c", 'exec "$HOME/$0" "$@"', python.removeprefix("~/")]


def _ssh_options(cluster: Cluster) -> list[str]:
    options: list[str] = []
    for flag, value in (
        ("-l", cluster.user),
        ("-p", cluster.port),
        ("-i", cluster.identity_file and os.path.expanduser(cluster.identity_file)),  # noqa: PTH111
        ("-J", cluster.proxy_jump),
    ):
        options += [flag, str(value)] if value is not None else []
    return options


# --- the file


def _profiles(text: str, file: Path) -> dict[str, Cluster]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {one_line(str(error))}") from error
    for key in data:
        if key != "clusters":
            raise ConfigError(f"{file}: {key}: unknown{_near(key, ['clusters'])}")
    tables = data.get("clusters", {})
    if not isinstance(tables, dict):
        raise ConfigError(f"{file}: clusters: must be tables, [clusters.NAME]")
    return {name: _profile(name, table, file) for name, table in tables.items()}


def _profile(name: str, table: Any, file: Path) -> Cluster:
    place = f"{file}: clusters.{name}"

    def fail(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{place}{'.' if key else ''}{key}: {message}")

    if not isinstance(table, Mapping):
        fail("", "must be a table, [clusters.NAME]")
    for key in table:
        if key not in KEYS:
            fail(key, f"unknown{_near(key, KEYS)}")
    if "host" not in table:
        fail("host", "missing: the login node's name or address")
    try:
        cluster = msgspec.convert(table, Cluster)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        fail(path.strip("`$."), message[:1].lower() + message[1:])
    check(name, cluster, fail)
    return cluster


def _toml(name: str, cluster: Cluster) -> str:
    values: dict[str, Any] = msgspec.to_builtins(cluster)
    slurm = values.pop("slurm", {})
    lines = [f"[clusters.{name}]", *(f"{key} = {_value(value)}" for key, value in values.items())]
    if slurm:
        lines += [f"[clusters.{name}.slurm]", *(f"{key} = {_value(value)}" for key, value in slurm.items())]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)  # TOML's own form for text without control characters, and numbers


def _near(word: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(word.lower(), known, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
