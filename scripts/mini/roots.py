"""Whole root directories with another release of Slurm in them: each made once, kept in a cache, never changed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mini.releases import KEPT, Release, mirror
from mini.words import Failed

TREE = Path(__file__).resolve().parent.parent.parent
RECIPE = 1  # goes up when a root is made otherwise than before
MODULES = Path("/usr/lib/uml/modules")
TOOLS = ("setuptools", "wheel")  # what makes slurmfork itself into an installed package, without a network


def cache() -> Path:
    """Where roots are kept; SLURMFORK_MINICLUSTER_CACHE names another place."""
    general = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("SLURMFORK_MINICLUSTER_CACHE") or general / "slurmfork-minicluster").absolute()


def needed() -> list[str]:
    """What slurmfork needs, as setup.cfg has it."""
    text = (TREE / "setup.cfg").read_text()
    found = re.search(r"^install_requires =\n((?: +.*\n)+)", text, re.MULTILINE)
    if not found:
        raise Failed("setup.cfg says nothing of what slurmfork needs")
    return found.group(1).split()


def place_of(release: Release) -> Path:
    recipe = repr((RECIPE, release, needed() if release.python else ()))
    return cache() / f"{release.suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def root_of(release: Release) -> Path:
    """The root with this release, made now if this is the first to ask; others wait meanwhile."""
    place = place_of(release)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failed(f"{place.parent}: {error.strerror}; SLURMFORK_MINICLUSTER_CACHE names another place", 3) from None
    with (place.parent / f".{release.suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            making = place.parent / f".making-{release.suite}"
            remove(making)
            try:
                make(release, making)
                making.rename(place)
            finally:
                remove(making)
    return place


def remove(root: Path) -> None:
    """What is mounted below it, if a making was killed, is another file system and stays."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], timeout=300, check=False)


def make(release: Release, root: Path) -> None:
    print(f"making a root of Debian {release.suite}, once, for Slurm {release.number} ...", file=sys.stderr)
    options = [f"--aptopt={option.replace('=', ' ')};" for option in release.options]
    packages = f"--include={','.join(release.packages)}"
    apart = ["unshare", "--mount", "--propagation=private"]  # who is killed in the middle leaves no mount
    tool([*apart, "mmdebstrap", "--quiet", "--variant=apt", packages, *options, release.suite, str(root), mirror()])
    found = tool(["chroot", str(root), "dpkg-query", "--show", "--showformat=${Version}", "slurmctld"])
    if not found.startswith(f"{release.number}."):
        raise Failed(f"Debian {release.suite} has Slurm {found} today, not {release.number}", 3)
    if release.python:
        install(root)


def install(root: Path) -> None:
    """A virtual environment with all that slurmfork needs; wheels are fetched here, for the Python there."""
    version = tool(["chroot", str(root), "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]).strip()
    wheels = root / "wheels"
    fetch = ["download", "--quiet", "--dest", str(wheels), "--only-binary=:all:", "--python-version", version]
    tool([*pip(), *fetch, *needed(), *TOOLS])
    tool(["chroot", str(root), "python3", "-m", "venv", KEPT])
    tool([*pip_of(root), "--find-links=/wheels", *needed(), *TOOLS])
    shutil.rmtree(wheels)


def pip_of(root: Path) -> list[str]:
    """The root's own pip, which asks no network and heeds no setting of this machine."""
    alone = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "PIP_CONFIG_FILE=/dev/null"]
    words = ["install", "--quiet", "--disable-pip-version-check", "--no-index"]
    return ["chroot", str(root), *alone, f"{KEPT}/bin/pip", *words]


def pip() -> list[str]:
    """This machine's: the one of this Python, or of an environment of its own."""
    mine = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*mine, "--version"], capture_output=True, timeout=60, check=False).returncode == 0:
        return mine
    tool([sys.executable, "-m", "venv", str(cache() / "pip")])
    return [str(cache() / "pip" / "bin" / "python"), *mine[1:]]


def install_tree(root: Path) -> None:
    """This working tree's slurmfork into a root that is one cluster's own; as a package, as users have it."""
    source = root / "usr" / "src" / "slurmfork"
    source.mkdir(parents=True)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TREE / name, source / name)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(TREE / "slurmfork", source / "slurmfork", ignore=ignored)  # templates/ is a link there
    tool([*pip_of(root), "--no-build-isolation", "--no-deps", "/usr/src/slurmfork"])
    (root / "usr" / "local" / "bin" / "slurmfork").symlink_to(f"{KEPT}/bin/slurmfork")


def tool(argv: Sequence[str]) -> str:
    """Runs a step of the making; returns what it printed."""
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False)
    except FileNotFoundError:
        raise Failed(f"{argv[0]} not found", 3) from None
    except subprocess.TimeoutExpired:
        raise Failed(f"{argv[0]} took more than 900 s", 3) from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
        errors = [line for line in reason if line.startswith(("E:", "ERROR"))]
        raise Failed(f"{' '.join(argv[:2])}: {(errors or reason)[-1][:300]}", 3)
    return done.stdout
