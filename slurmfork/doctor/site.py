"""The site: what Slurm says of itself here, read once, for the checks to look at.

``scontrol show config``, its partitions and some of its nodes, in the text forms that all releases have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from slurmfork.backends.slurm_commands import Answer, ask

NODES_LOOKED_AT = 8
_SETTING = re.compile(r"^(\w+)\s*=[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_WORD = re.compile(r"(?:^|\s)([A-Za-z][\w/]*)=")
_NOTHING = frozenset({"", "(null)", "N/A", "none", "(null type)"})


@dataclass(frozen=True)
class Site:
    """``settings`` are those of slurm.conf and cgroup.conf; ``partitions`` and ``nodes`` have a mapping for each.

    ``client`` is the release of the commands here. Of the nodes only some are there, and none where they are hidden.
    """

    settings: Mapping[str, str]
    partitions: Sequence[Mapping[str, str]] = ()
    nodes: Sequence[Mapping[str, str]] = ()
    client: str = ""
    accounting: Answer | None = None
    environment: Mapping[str, str] | None = None

    def text(self, name: str) -> str:
        """A setting; empty where it is not set, or this release has none of that name."""
        value = self.settings.get(name, "")
        return "" if value in _NOTHING else value

    def words(self, name: str) -> dict[str, str]:
        """A list of parameters, ``a,b=1``: value by name in lower case, empty where it has none."""
        parts = (part.strip().partition("=") for part in self.text(name).split(","))
        return {word.lower(): value for word, _, value in parts if word}

    def seconds(self, name: str) -> int | None:
        """A number of seconds, ``30 sec``; None where there is none."""
        found = re.match(r"\d+", self.settings.get(name, ""))
        return int(found[0]) if found else None

    def plugin(self, name: str) -> str:
        """The last part of a plugin's name: ``cgroup`` of ``proctrack/cgroup``; empty for none."""
        word = self.text(name).rpartition("/")[2]
        return "" if word in _NOTHING else word

    @property
    def release(self) -> tuple[int, int]:
        """Of slurmctld: (22, 5); (0, 0) where it cannot be read."""
        return release_of(self.settings.get("SLURM_VERSION", ""))


def release_of(text: str) -> tuple[int, int]:
    """(22, 5) of ``slurm-wlm 22.05.8``, or of ``22.05.8``; (0, 0) where there is none."""
    found = re.search(r"\b(\d{2})\.(\d{2})\b", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def settings_of(text: str) -> dict[str, str]:
    """``scontrol show config``: value by name."""
    return dict(_SETTING.findall(text))


def records_of(text: str) -> list[dict[str, str]]:
    """``scontrol -o show partition`` or ``node``: a mapping for each line. Values may hold blanks."""
    return [dict(_fields(line)) for line in text.splitlines() if "=" in line]


def _fields(line: str) -> Iterator[tuple[str, str]]:
    marks = list(_WORD.finditer(line))
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        yield mark[1], line[mark.end() : following.start() if following else len(line)].strip()


def read(settings: str, environment: Mapping[str, str]) -> Site:
    """The site of which ``settings`` is the configuration; what else it is asked for may come out empty."""
    nodes = list(dict.fromkeys(ask(["sinfo", "-h", "-N", "-o", "%N"]).output.split()))[:NODES_LOOKED_AT]
    shown = ask(["scontrol", "-o", "show", "node", ",".join(nodes)]).output if nodes else ""
    return Site(
        settings=settings_of(settings),
        partitions=records_of(ask(["scontrol", "-o", "show", "partition"]).output),
        nodes=records_of(shown),
        client=ask(["sbatch", "--version"]).output.strip(),
        accounting=ask(["sacct", "-X", "-n", "-P", "-o", "JobIDRaw", "-S", "now"]),
        environment=environment,
    )


def several(names: Iterable[str], most: int = 8) -> str:
    """Names in a sentence, not too many of them."""
    listed = sorted(set(names))
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
