"""STUB until the branch with profiles is merged."""

import sys
from dataclasses import dataclass, field

from slurmfork.remote.local import LocalTransport


@dataclass
class Profile:
    name: str
    python: str = sys.executable
    root: str | None = None
    slurm: dict = field(default_factory=dict)


def load(name):
    return Profile(name)


def transport_of(profile):
    return LocalTransport(profile.name)
