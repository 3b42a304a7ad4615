"""Hints: commands as a message tells its reader to type them, who may sit at another machine than the writer."""

from __future__ import annotations

_away: list[str] = []


def came_by(cluster: str) -> None:
    """From now on this process's reader is one who knows this machine as that cluster."""
    _away[:] = ["--cluster", cluster]


def command(verb: str, *words: str) -> str:
    """`slurmfork VERB ...` in the backquotes of messages; with the --cluster by which its reader came, if any."""
    return f"`{' '.join(['slurmfork', verb, *_away, *words])}`"
