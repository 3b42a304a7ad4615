"""The distribution's packages: what is missing is installed, and starts nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mini.inside import programs
from mini.sites import foreign_commands
from mini.words import Failed, Shape

BASIC = {"slurmctld": "slurmctld", "slurmd": "slurmd", "srun": "slurm-client", "munged": "munge"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}
SSH = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "useradd": "passwd"}
MAKING = {"mmdebstrap": "mmdebstrap", "unshare": "util-linux"}
POLICY = Path("/usr/sbin/policy-rc.d")  # Debian asks this file whether an install may start a daemon


def need_packages(shape: Shape, may_install: bool) -> None:
    wanted = dict(programs(shape)) if shape.rooted else BASIC | (ACCOUNTING if shape.accounting else {})
    wanted |= MAKING if foreign_commands(shape) else {}
    wanted |= {**SSH, shape.login_shell: shape.login_shell} if shape.ssh else {}
    missing = [command for command in wanted if not shutil.which(command)]
    packages = " ".join(sorted({wanted[command] for command in missing}))
    if os.getuid() != 0:
        raise Failed(
            "needs root, because Slurm's daemons start jobs and make device files"
            + (f"; and these packages are missing: {packages}" if packages else ""),
            3,
        )
    if missing and not may_install:
        raise Failed(f"{', '.join(missing)} not found; install {packages}", 3)
    if missing and not shutil.which("apt-get"):
        raise Failed(f"{', '.join(missing)} not found, and no apt-get here to install {packages}", 3)
    if missing:
        install(packages.split())
        if still := [command for command in missing if not shutil.which(command)]:
            raise Failed(f"{', '.join(still)} not found, although {packages} are installed", 3)


def install(packages: list[str]) -> None:
    print(f"installing {' '.join(packages)}", file=sys.stderr)
    with no_autostart():
        command = ["apt-get", "install", "--yes", "-qq", "--no-install-recommends", *packages]
        if apt(command).returncode != 0:
            apt(["apt-get", "update", "-qq"])
            done = apt(command)
            if done.returncode != 0:
                reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
                raise Failed(f"apt-get cannot install {' '.join(packages)}: {reason}", 3)


def apt(command: list[str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    try:
        return subprocess.run(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{' '.join(command[:2])} took more than 600 s", 3) from None


@contextlib.contextmanager
def no_autostart() -> Iterator[None]:
    """Keeps the packages from starting the machine's own Slurm; asks a policy that is already there."""
    if POLICY.exists():
        asked = subprocess.run([POLICY, "slurmd", "start"], capture_output=True, timeout=30, check=False)
        if asked.returncode != 101:
            raise Failed(f"{POLICY} would let the packages start daemons; install them yourself", 3)
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)
