"""Which releases of Slurm there are to be had: Debian has one in each suite."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from mini.words import Failed

BASE = (
    "mount slurmctld slurmd slurm-client munge python3 python3-venv procps iproute2 netbase kmod hostname"
    " openssh-server libpam-slurm-adopt"
)
KEPT = "/opt/slurmfork"  # in each root: the virtual environment that has slurmfork


@dataclass(frozen=True)
class Release:
    """One release, the suite that has it, and what its packages are called there."""

    number: str
    suite: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    python: bool = True  # the suite's own is new enough for slurmfork

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(map(int, self.number.split(".")))


RELEASES = {
    one.number: one
    for one in (
        Release("20.11", "bullseye", tuple(BASE.split()), python=False),
        Release("22.05", "bookworm", tuple(BASE.split())),
        Release("24.11", "trixie", tuple(BASE.split())),
        # the lists of an unstable suite are of one day, and a mirror may be behind
        Release("26.05", "sid", tuple(BASE.split()), ("Acquire::Check-Valid-Until=false",)),
    )
}


def numbers_of(version: str) -> tuple[int, ...]:
    """(24, 11) of 24.11.5; empty where it is not one."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, found.groups())) if found else ()


def own() -> str:
    """The number of the machine's own Slurm, 22.05; empty where it has none."""
    program = shutil.which("slurmd")
    if not program:
        return ""
    said = subprocess.run([program, "-V"], capture_output=True, text=True, timeout=30, check=False).stdout
    return ".".join(map("{:02}".format, numbers_of(said.split()[-1]))) if said else ""


def mirror() -> str:
    """The address that this machine's apt has Debian from."""
    wanted = ["--format", "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)", "Identifier: Packages"]
    try:
        said = subprocess.run(
            ["apt-get", "indextargets", *wanted], capture_output=True, text=True, timeout=60, check=False
        ).stdout
    except FileNotFoundError:
        raise Failed("other releases of Slurm come from Debian's suites, and there is no apt-get here", 3) from None
    for origin, component, uri in (line.split("|", 2) for line in said.splitlines() if line.count("|") == 2):
        if origin == "Debian" and component == "main" and "security" not in uri:
            return uri.rstrip("/")
    raise Failed("other releases of Slurm come from Debian's suites, and apt knows no mirror of Debian here", 3)
